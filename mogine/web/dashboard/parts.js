// What screens are made of: tiles, tables, charts with their table, and files of what is shown.

import { h } from "../shared/dom.js";
import { meaningOf, t } from "./words.js";

/** @typedef {{label: string, of: (row: any) => any, kind?: "number" | "text" | "when", show?: (value: any, row: any) => Node | string}} Column */
/** @typedef {{title: string, columns: string[], rows: unknown[][]}} Sheet what "export" writes */

// Steps of an axis for what comes in whole numbers.
const WHOLE = Array.from({ length: 9 }, (_, power) => [1, 2, 5].map((step) => step * 10 ** power)).flat();

let tips = 0;

/**
 * @param {{label: string, value: string, change?: Node | null, definition?: string, tone?: string}} tile
 * @returns {HTMLElement}
 */
export function tile({ label, value, change = null, definition = "", tone = "" }) {
  return h("div", { class: `tile ${tone}` }, h("p", { class: "label" }, defined(label, definition)), h("p", { class: "value" }, value), h("p", { class: "change" }, change ?? "\u00a0"));
}

/** A number's name, which tells what it means on hover and focus. @param {string} label @param {string} [meaning] */
export function defined(label, meaning = "") {
  meaning ||= meaningOf(label);
  if (meaning === "") return h("span", {}, label);
  const id = `tip-${(tips += 1)}`;
  const tip = h("span", { class: "tip", role: "tooltip", id }, meaning);
  const button = h("button", { type: "button", class: "defined", "aria-describedby": id, keydown: (event) => event.key === "Escape" && event.target.blur() }, label);
  // Beside its name in the window, since tables would cut it off.
  const put = () => {
    const { left, top, bottom } = button.getBoundingClientRect();
    const below = bottom + 8 + tip.offsetHeight <= innerHeight;
    tip.style.setProperty("left", `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`);
    tip.style.setProperty("top", `${below ? bottom + 8 : top - 8 - tip.offsetHeight}px`);
  };
  return h("span", { class: "has-tip", pointerenter: put, focusin: put }, button, tip);
}

/** The change against the period before, told by sign and word, not by colour alone.
 * @param {number | null} now @param {number | null} before @param {boolean | null} moreIsBetter */
export function change(now, before, moreIsBetter) {
  if (now === null || before === null || now === undefined || before === undefined) return null;
  if (before === 0) return h("span", {}, now === 0 ? t.same : t.newSince);
  const share = (now - before) / Math.abs(before);
  const tone = moreIsBetter === null || Math.abs(share) < 0.005 ? "" : share > 0 === moreIsBetter ? "good" : "bad";
  const text = Math.abs(share) < 0.005 ? t.same : `${share > 0 ? "▲ +" : "▼ −"}${percent(Math.abs(share), Math.abs(share) < 0.1 ? 1 : 0)}`;
  return h("span", { class: tone, title: t.before }, text);
}

/**
 * @param {string} title @param {Column[]} columns @param {any[]} rows
 * @param {{pick?: (row: any) => void, empty?: string, bars?: number}} [options] `bars` is the column whose size is drawn
 */
export function table(title, columns, rows, { pick, empty = t.nothing, bars = -1 } = {}) {
  if (rows.length === 0) return h("p", { class: "empty" }, empty);
  const most = bars < 0 ? 0 : Math.max(1e-9, ...rows.map((row) => Number(columns[bars].of(row)) || 0));
  const head = h("tr", {}, ...columns.map(({ label, kind }) => h("th", { scope: "col", class: kind ?? null }, defined(label))));
  const body = rows.map((row) => {
    const cells = columns.map(({ of, kind, show }, at) => {
      const value = of(row);
      const shown = show ? show(value, row) : value === null || value === undefined ? "–" : String(value);
      const cell = h("td", { class: kind ?? null, dir: kind === "number" ? null : "auto" }, shown);
      if (at === bars) cell.style.setProperty("--share", String((Number(value) || 0) / most));
      if (at === bars) cell.classList.add("bar");
      return cell;
    });
    if (pick) {
      const button = h("button", { type: "button", class: "pick", click: () => pick(row) });
      button.append(...cells[0].childNodes);
      cells[0].append(button);
    }
    return h("tr", {}, ...cells);
  });
  return h("div", { class: "table", tabindex: "0", role: "region", "aria-label": title }, h("table", {}, h("caption", { class: "hidden-visually" }, title), h("thead", {}, head), h("tbody", {}, ...body)));
}

/** @param {string} title @param {...(Node | string | null)} content */
export function card(title, ...content) {
  return h("section", { class: "card" }, h("h2", {}, title), ...content);
}

/**
 * Bars or lines over days, and the same as a table.
 * @param {string} title @param {string[]} labels days such as 2026-03-31
 * @param {{name: string, values: (number | null)[], kind?: "bars" | "line" | "before", tone?: string, format?: (value: number) => string}[]} series
 */
export function chart(title, labels, series) {
  const box = h("div", { class: "plot", role: "img", "aria-label": `${title}: ${summary(labels, series)}` });
  const rows = labels.map((label, at) => [label, ...series.map(({ values }) => values[at])]);
  const columns = [t.day, ...series.map(({ name }) => name)].map((label, at) => ({
    label,
    of: (/** @type {any[]} */ row) => row[at],
    kind: /** @type {"number" | "text"} */ (at > 0 ? "number" : "text"),
    show: (/** @type {any} */ value) => (at === 0 || value === null || value === undefined ? value ?? "–" : (series[at - 1].format ?? number)(value)),
  }));
  const draw = () => plot(box, labels, series);
  const seen = new ResizeObserver(() => draw());
  seen.observe(box);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", draw);
  return h("div", { class: "chart" }, box, h("details", {}, h("summary", {}, t.asTable), table(title, columns, rows)));
}

/** @param {string[]} labels @param {{name: string, values: (number | null)[], format?: (value: number) => string}[]} series */
function summary(labels, series) {
  if (labels.length === 0) return t.nothing;
  return series
    .map(({ name, values, format = number }) => `${name} ${format(Number(values.at(-1) ?? 0))} (${labels.at(-1)}), ${t.most} ${format(Math.max(0, ...values.map(Number)))}`)
    .join("; ");
}

/** @param {HTMLElement} box @param {string[]} labels @param {any[]} series */
function plot(box, labels, series) {
  const { uPlot } = /** @type {any} */ (window);
  if (!box.isConnected || !uPlot || box.clientWidth === 0) return;
  const style = getComputedStyle(box);
  const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
  const days = labels.map((label) => Date.parse(`${label}T00:00:00Z`) / 1000);
  const axis = { stroke: colour("--ink-2"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  const day = new Intl.DateTimeFormat(t.locale, { timeZone: "UTC", month: "short", day: "numeric" });
  const shapes = series.map(({ name, kind = "bars", format = number, tone = "--accent" }) => ({
    label: name,
    stroke: colour(kind === "before" ? "--ink-2" : tone),
    fill: kind === "bars" ? colour(tone) : undefined,
    width: kind === "bars" ? 0 : 2,
    dash: kind === "before" ? [4, 4] : undefined,
    points: { show: kind !== "bars" && labels.length < 32, size: 5 },
    paths: kind === "bars" ? uPlot.paths.bars({ size: [0.7, 48], radius: 0.15 }) : undefined,
    value: (/** @type {any} */ _, /** @type {number | null} */ value) => (value === null ? "–" : format(value)),
  }));
  const options = {
    width: box.clientWidth,
    height: 220,
    padding: [10, 8, 0, 0],
    scales: { x: { time: true, range: (/** @type {any} */ _, /** @type {number} */ low, /** @type {number} */ high) => [low - 43200, high + 43200] }, y: { range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ high) => [0, high > 0 ? high * 1.08 : 1] } },
    tzDate: (/** @type {number} */ stamp) => uPlot.tzDate(new Date(stamp * 1000), "Etc/UTC"),
    axes: [
      { ...axis, grid: { show: false }, size: 30, space: 60, values: (/** @type {any} */ _, /** @type {number[]} */ splits) => splits.map((split) => day.format(new Date(split * 1000))) },
      { ...axis, size: 56, incrs: series[0]?.format ? undefined : WHOLE, values: (/** @type {any} */ _, /** @type {number[]} */ splits) => splits.map((split) => (series[0]?.format ?? number)(split)) },
    ],
    series: [{ label: t.day, value: (/** @type {any} */ _, /** @type {number | null} */ at) => (at === null ? "–" : day.format(new Date(at * 1000))) }, ...shapes],
    cursor: { drag: { x: false, y: false }, points: { show: false } },
    hooks: { setCursor: [(/** @type {any} */ drawn) => drawn.cursor.idx === null && showLast(drawn)] },
  };
  // While nobody points at a day, the legend tells the last one.
  const showLast = (/** @type {any} */ drawn) => drawn.setLegend({ idx: days.length - 1 }, false);
  box.replaceChildren();
  showLast(new uPlot(options, [days, ...series.map(({ values }) => values)], box));
}

/** Hour by weekday as a table whose cells are shaded. @param {number[][]} grid seven rows, Monday first */
export function heat(grid) {
  const most = Math.max(1, ...grid.flat());
  const head = h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden-visually" }, t.weekday)), ...grid[0].map((_, hour) => h("th", { scope: "col" }, hour % 3 === 0 ? String(hour) : h("span", { class: "hidden-visually" }, String(hour)))));
  const rows = grid.map((counts, day) => {
    const name = t.weekdays[day];
    const cells = counts.map((count, hour) => {
      const cell = h("td", { title: `${name} ${hour}:00 – ${number(count)}` }, h("span", { class: "hidden-visually" }, String(count)));
      cell.style.setProperty("--share", String(count / most));
      return cell;
    });
    return h("tr", {}, h("th", { scope: "row" }, name), ...cells);
  });
  return h("div", { class: "heat", tabindex: "0", role: "region", "aria-label": t.when }, h("table", {}, h("caption", { class: "hidden-visually" }, t.when), h("thead", {}, head), h("tbody", {}, ...rows)));
}

/** @param {string} text @param {string} [tone] good, bad, warn or "" */
export function badge(text, tone = "") {
  return h("span", { class: `badge ${tone}` }, text);
}

/** @param {string} name @param {Sheet[]} sheets */
export function saveSheets(name, sheets) {
  const lines = sheets.flatMap(({ title, columns, rows }) => [[title], columns, ...rows, []]);
  const text = `\ufeff${lines.map((cells) => cells.map(csvCell).join(",")).join("\r\n")}\r\n`;
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
  const link = h("a", { href: address, download: `${name}.csv`, hidden: true });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** @param {unknown} value quoted, and never taken for a formula by a spreadsheet */
function csvCell(value) {
  if (typeof value === "number") return `"${value}"`;
  let text = String(value ?? "").replace(/[\r\n\v\f\u0085\u2028\u2029]+/g, " ");
  if (/^[\s\ufeff\u200b-\u200f\u2060]*[=+\-@＝＋－＠﹢﹣﹦﹫\t]/.test(text)) text = `'${text}`;
  return `"${text.replaceAll('"', '""')}"`;
}

/** @param {number | null | undefined} value */
export function number(value) {
  return value === null || value === undefined ? "–" : new Intl.NumberFormat(t.locale, { maximumFractionDigits: 2 }).format(value);
}

/** @param {number | null | undefined} value @param {number} [digits] */
export function percent(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  return new Intl.NumberFormat(t.locale, { style: "percent", maximumFractionDigits: digits }).format(value);
}

/** @param {number | null | undefined} value */
export function yuan(value) {
  if (value === null || value === undefined) return "–";
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 0.1 || value === 0 ? 2 : 4;
  return `¥${new Intl.NumberFormat(t.locale, { minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value)}`;
}

/** @param {number | null | undefined} ms */
export function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  return ms < 1000 ? `${number(Math.round(ms))} ms` : `${number(Math.round(ms / 100) / 10)} s`;
}

/** @param {number} bytes */
export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (bytes >= 1024 && at < units.length - 1) {
    bytes /= 1024;
    at += 1;
  }
  return `${number(Math.round(bytes * 10) / 10)} ${units[at]}`;
}

/** @param {string | null} iso @param {string} zone */
export function moment(iso, zone) {
  if (!iso) return "–";
  return new Intl.DateTimeFormat(t.locale, { timeZone: zone, dateStyle: "short", timeStyle: "medium" }).format(new Date(iso));
}
