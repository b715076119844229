// The screens that are made of sums: overview, cost, quality, system.

import { h } from "../shared/dom.js";
import { ask } from "./api.js";
import { badge, card, change, chart, duration, heat, moment, number, percent, size, table, tile, yuan } from "./parts.js";
import { t } from "./words.js";

const LIVE_MS = 5000;
const LIVE_ROWS = 8;

/**
 * @typedef {import("./dashboard.js").Place} Place
 * @typedef {import("./parts.js").Sheet} Sheet
 * @typedef {{nodes: Node[], sheets: Sheet[]}} Screen
 */

/** @param {Place} place */
async function statistics(place) {
  const { signal, range } = place;
  const found = await ask("statistics", range, { signal });
  let before = null;
  if (place.compare) {
    const [since, until] = [found.previous.since, found.previous.until].map((iso) => localDay(iso, found.window.timezone));
    const last = new Date(Date.parse(`${until}T00:00:00Z`) - 86_400_000).toISOString().slice(0, 10);
    before = await ask("statistics", { since, until: last }, { signal });
  }
  place.showZone(found.window.timezone);
  return { found, before };
}

/** @param {string} iso @param {string} zone */
function localDay(iso, zone) {
  return new Intl.DateTimeFormat("en-CA", { timeZone: zone }).format(new Date(iso));
}

/** @param {any} found @param {string} name */
function meaning(found, name) {
  return t.definitions[name] ?? String(found.definitions?.[name] ?? "");
}

/** @param {Place} place @returns {Promise<Screen>} */
export async function overview(place) {
  const { found, before } = await statistics(place);
  const { totals, previous, series } = found;
  if (totals.questions === 0 && totals.bots === 0) return { nodes: [empty()], sheets: [] };
  const against = (/** @type {string} */ name, /** @type {boolean | null} */ moreIsBetter) => (place.compare ? change(totals[name], previous[name], moreIsBetter) : null);
  const one = (/** @type {string} */ label, /** @type {string} */ name, /** @type {string} */ value, /** @type {boolean | null} */ better) => tile({ label, value, change: against(name, better), definition: meaning(found, name) });
  const tiles = [
    one(t.questions, "questions", number(totals.questions), true),
    one(t.visitors, "visitors", number(totals.visitors), true),
    one(t.answeredShare, "answered_share", percent(totals.answered_share), true),
    one(t.thumbs, "thumbs_up", `${number(totals.thumbs_up)} / ${number(totals.thumbs_down)}`, true),
    one(t.cost, "cost_cny", yuan(totals.cost_cny), null),
    tile({ label: t.firstToken, value: duration(found.latency.first_token_ms.p50), definition: meaning(found, "first_token_ms"), change: place.compare && before ? change(found.latency.first_token_ms.p50, before.latency.first_token_ms.p50, false) : null }),
    one(t.errorShare, "error_share", percent(totals.error_share), false),
    ...(place.bots ? [one(t.crawlers, "bots", number(totals.bots), null)] : []),
  ];
  const days = series.map((/** @type {any} */ row) => row.day);
  const perDay = series.map((/** @type {any} */ row) => row.questions);
  const lines = [{ name: t.questions, values: perDay, kind: /** @type {const} */ ("bars") }];
  const all = before ? [...lines, { name: t.previous, values: before.series.map((/** @type {any} */ row) => row.questions), kind: /** @type {const} */ ("before") }] : lines;
  const questions = [
    { label: t.question, of: (/** @type {any} */ row) => row.question },
    { label: t.questions, of: (/** @type {any} */ row) => row.questions, kind: /** @type {const} */ ("number"), show: number },
    { label: t.unanswered, of: (/** @type {any} */ row) => row.unanswered, kind: /** @type {const} */ ("number"), show: number },
  ];
  const sources = [
    { label: t.title, of: (/** @type {any} */ row) => row.title || row.source },
    { label: t.hits, of: (/** @type {any} */ row) => row.questions, kind: /** @type {const} */ ("number"), show: number },
    { label: t.score, of: (/** @type {any} */ row) => row.score, kind: /** @type {const} */ ("number"), show: number },
  ];
  return {
    nodes: [
      h("div", { class: "tiles" }, ...tiles),
      h("div", { class: "columns" }, card(t.perDay, chart(t.perDay, days, all)), card(t.when, heat(found.hour_weekday))),
      h("div", { class: "columns even" }, card(t.topQuestions, table(t.topQuestions, questions, found.top_questions.slice(0, 10), { bars: 1, pick: (row) => place.go({ view: "conversations", q: row.question.slice(0, 80) }) })), card(t.topSources, table(t.topSources, sources, found.top_sources.slice(0, 10), { bars: 1 }))),
      card(t.live, live(place)),
    ],
    sheets: [
      totalsSheet(found),
      seriesSheet(t.perDay, series),
      { title: t.when, columns: [t.weekday, ...found.hour_weekday[0].map((/** @type {number} */ _, /** @type {number} */ hour) => `${hour}:00`)], rows: found.hour_weekday.map((/** @type {number[]} */ counts, /** @type {number} */ day) => [t.weekdays[day], ...counts]) },
      { title: t.topQuestions, columns: questions.map((c) => c.label), rows: found.top_questions.map((/** @type {any} */ row) => questions.map((c) => c.of(row))) },
      { title: t.topSources, columns: ["source", ...sources.map((c) => c.label)], rows: found.top_sources.map((/** @type {any} */ row) => [row.source, ...sources.map((c) => c.of(row))]) },
    ],
  };
}

/** @param {string} title @param {any[]} series everything of each day @returns {Sheet} */
function seriesSheet(title, series) {
  return { title, columns: Object.keys(series[0] ?? {}), rows: series.map((row) => Object.values(row)) };
}

/** @param {any} found @returns {Sheet} */
function totalsSheet(found) {
  const names = Object.keys(found.totals);
  const row = (/** @type {string} */ name, /** @type {any} */ of) => [name, ...names.map((each) => of[each])];
  return { title: `${found.window.since} – ${found.window.until} (${found.window.timezone})`, columns: ["", ...names], rows: [row("now", found.totals), row("before", found.previous)] };
}

function empty() {
  return h("section", { class: "card blank" }, h("h2", {}, t.emptyTitle), h("p", {}, t.emptyHow), h("pre", { tabindex: "0" }, h("code", {}, "mogine chat")), h("p", {}, t.emptyThen));
}

/** The newest questions, looked for every few seconds while they can be seen. @param {Place} place */
function live(place) {
  const box = h("div", { class: "live" }, h("p", { class: "empty" }, t.loading));
  const show = async () => {
    if (place.signal.aborted) return;
    if (!document.hidden) {
      const page = await ask("queries", { limit: LIVE_ROWS, bot: place.bots ? "" : "no" }, { signal: place.signal }).catch(() => null);
      if (page && !box.matches(":focus-within")) box.replaceChildren(questionTable(page.queries, place));
    }
    setTimeout(() => void show(), LIVE_MS);
  };
  void show();
  return box;
}

/** @param {any[]} rows @param {Place} place */
export function questionTable(rows, place) {
  const tone = { ok: "good", error: "bad", refused: "warn", aborted: "" };
  return table(
    t.live,
    [
      { label: t.question, of: (row) => row.question || row.id.slice(0, 12) },
      { label: t.time, of: (row) => row.started_at, kind: "when", show: (iso) => moment(iso, place.zone) },
      { label: t.status, of: (row) => row.status, show: (status) => badge(t.statuses[/** @type {"ok"} */ (status)] ?? status, tone[/** @type {"ok"} */ (status)]) },
      { label: t.answered, of: (row) => row.answered, show: (answered) => badge(t[/** @type {"yes"} */ (answered)] ?? answered, answered === "no" ? "bad" : answered === "yes" ? "good" : "") },
      { label: t.rating, of: (row) => row.feedback, show: (rating) => (rating ? badge(t.ratings[/** @type {"up"} */ (rating)], rating === "up" ? "good" : "bad") : "–") },
      { label: t.provider, of: (row) => row.provider },
      { label: t.firstWord, of: (row) => row.first_token_ms, kind: "number", show: duration },
      { label: t.cost, of: (row) => row.cost_cny, kind: "number", show: yuan },
    ],
    rows,
    { pick: (row) => place.go(row.session ? { view: "conversations", session: row.session, id: row.id } : { view: "conversations", id: row.id }) },
  );
}

/** @param {any[]} rows @param {"provider" | "model"} name @param {string} label */
function costTable(rows, name, label) {
  const columns = [
    { label: t[name], of: (/** @type {any} */ row) => row[name] || t.reasonNone },
    { label: t.cost, of: (/** @type {any} */ row) => row.cost_cny, kind: /** @type {const} */ ("number"), show: yuan },
    { label: t.questions, of: (/** @type {any} */ row) => row.questions, kind: /** @type {const} */ ("number"), show: number },
    { label: t.perQuestion, of: (/** @type {any} */ row) => (row.questions ? row.cost_cny / row.questions : null), kind: /** @type {const} */ ("number"), show: yuan },
    { label: t.tokens, of: (/** @type {any} */ row) => `${number(row.prompt_tokens)} / ${number(row.completion_tokens)} / ${number(row.reasoning_tokens)}`, kind: /** @type {const} */ ("number") },
  ];
  return { node: table(label, columns, rows, { bars: 1 }), sheet: { title: label, columns: columns.map((c) => c.label), rows: rows.map((row) => columns.map((c) => c.of(row))) } };
}

/** @param {Place} place @returns {Promise<Screen>} */
export async function cost(place) {
  const [{ found }, budget] = await Promise.all([statistics(place), ask("budget", {}, { signal: place.signal })]);
  const spent = (/** @type {string} */ label, /** @type {number} */ value, /** @type {number | null} */ limit) => {
    const share = limit ? value / limit : 0;
    const meter = limit ? h("meter", { min: "0", max: "1", low: "0.8", high: "0.999", optimum: "0.5", value: String(Math.min(1, share)), "aria-label": `${label}: ${percent(share, 0)} ${t.used}` }) : null;
    const note = h("span", { class: share >= 1 ? "bad" : share >= 0.8 ? "warn" : "" }, limit ? `${percent(share, 0)} · ${t.budgetOf(yuan(limit))}` : t.noBudget);
    const made = tile({ label, value: yuan(value), change: note, definition: meaning(found, "cost_cny") });
    if (meter) made.append(meter);
    return made;
  };
  const over = budget.monthly_budget_cny && budget.forecast_month_cny > budget.monthly_budget_cny;
  const days = found.series.map((/** @type {any} */ row) => row.day);
  const provider = costTable(found.by_provider, "provider", t.byProvider);
  const model = costTable(found.by_model, "model", t.byModel);
  return {
    nodes: [
      h("div", { class: "tiles" }, spent(t.spentToday, budget.today_cny, budget.daily_budget_cny), spent(t.spentMonth, budget.month_cny, budget.monthly_budget_cny), tile({ label: t.forecast, value: yuan(budget.forecast_month_cny), change: over ? h("span", { class: "bad" }, `▲ ${t.budgetOf(yuan(budget.monthly_budget_cny))}`) : null }), tile({ label: t.cost, value: yuan(found.totals.cost_cny), change: place.compare ? change(found.totals.cost_cny, found.previous.cost_cny, null) : null, definition: meaning(found, "cost_cny") })),
      card(t.costPerDay, chart(t.costPerDay, days, [{ name: t.cost, values: found.series.map((/** @type {any} */ row) => row.cost_cny), format: yuan }])),
      card(t.byProvider, provider.node),
      card(t.byModel, model.node),
    ],
    sheets: [
      { title: t.views.cost, columns: Object.keys(budget), rows: [Object.values(budget)] },
      totalsSheet(found),
      seriesSheet(t.costPerDay, found.series),
      provider.sheet,
      model.sheet,
    ],
  };
}

/** @param {Place} place @returns {Promise<Screen>} */
export async function quality(place) {
  const [{ found, before }, system] = await Promise.all([statistics(place), ask("system", {}, { signal: place.signal })]);
  const wait = (/** @type {string} */ label, /** @type {string} */ name, /** @type {string} */ p) => tile({ label, value: duration(found.latency[name][p]), change: before ? change(found.latency[name][p], before.latency[name][p], false) : null, definition: meaning(found, name) });
  const first = t.firstWord;
  const days = found.series.map((/** @type {any} */ row) => row.day);
  const reasons = [
    { label: t.errorType, of: (/** @type {any} */ row) => row.error || t.reasonNone },
    { label: t.questions, of: (/** @type {any} */ row) => row.questions, kind: /** @type {const} */ ("number"), show: number },
    { label: t.errors, of: (/** @type {any} */ row) => row.errors, kind: /** @type {const} */ ("number"), show: number },
    { label: t.refused, of: (/** @type {any} */ row) => row.refused, kind: /** @type {const} */ ("number"), show: number },
    { label: t.aborted, of: (/** @type {any} */ row) => row.aborted, kind: /** @type {const} */ ("number"), show: number },
  ];
  const vendors = Object.entries(system.servers.proxy?.providers ?? {}).map(([name, of]) => ({ name, .../** @type {any} */ (of) }));
  const breakers = table(
    t.breakers,
    [
      { label: t.provider, of: (row) => row.name },
      { label: t.breaker, of: (row) => row.breaker, show: (state) => badge(t.breakerStates[/** @type {"open"} */ (state)] ?? state, state === "closed" ? "good" : "bad") },
      { label: t.keys, of: (row) => row.keys, kind: "number" },
      { label: t.resting, of: (row) => row.keys_resting, kind: "number" },
    ],
    vendors,
    { empty: t.noVendors },
  );
  return {
    nodes: [
      h("div", { class: "tiles" }, ...["p50", "p95", "p99"].map((p) => wait(`${first}, ${t[/** @type {"p50"} */ (p)]}`, "first_token_ms", p)), ...["p50", "p95", "p99"].map((p) => wait(`${t.wholeAnswer}, ${t[/** @type {"p50"} */ (p)]}`, "duration_ms", p))),
      card(t.errorsPerDay, chart(t.errorsPerDay, days, [
        { name: t.errors, values: found.series.map((/** @type {any} */ row) => row.errors), kind: "line", tone: "--danger" },
        { name: t.refused, values: found.series.map((/** @type {any} */ row) => row.refused), kind: "line", tone: "--warn" },
      ])),
      h("div", { class: "columns even" }, card(t.byError, table(t.byError, reasons, found.by_error, { bars: 1 })), card(t.breakers, breakers)),
    ],
    sheets: [
      totalsSheet(found),
      { title: t.latency, columns: ["ms", t.p50, t.p95, t.p99], rows: [[first, "first_token_ms"], [t.wholeAnswer, "duration_ms"]].map(([label, name]) => [label, ...["p50", "p95", "p99"].map((p) => found.latency[name][p])]) },
      seriesSheet(t.errorsPerDay, found.series),
      { title: t.byError, columns: reasons.map((c) => c.label), rows: found.by_error.map((/** @type {any} */ row) => reasons.map((c) => c.of(row))) },
      { title: t.breakers, columns: [t.provider, t.breaker, t.keys, t.resting], rows: vendors.map((row) => [row.name, row.breaker, row.keys, row.keys_resting]) },
    ],
  };
}

/** @param {Place} place @returns {Promise<Screen>} */
export async function system(place) {
  const found = await ask("system", {}, { signal: place.signal });
  const tone = { ready: "good", not_ready: "warn", unreachable: "bad" };
  const rows = Object.entries(found.servers).map(([name, of]) => ({ name, .../** @type {any} */ (of) }));
  const servers = table(
    t.servers,
    [
      { label: t.name, of: (row) => row.name },
      { label: t.status, of: (row) => row.status, show: (status) => badge(t[/** @type {"ready"} */ (status)] ?? status, tone[/** @type {"ready"} */ (status)]) },
      { label: t.detail, of: (row) => Object.values(row.problems).join("; ") || "–" },
      { label: t.took, of: (row) => row.took_ms, kind: "number", show: duration },
    ],
    rows,
  );
  const pairs = (/** @type {string} */ title, /** @type {[string, string][]} */ rows) => table(title, [{ label: t.name, of: (row) => row[0] }, { label: t.detail, of: (row) => row[1] }], rows);
  const files = Object.entries(found.files).map(([name, bytes]) => /** @type {[string, string]} */ ([t.fileNames[/** @type {"all"} */ (name)] ?? name, size(Number(bytes))]));
  const versions = /** @type {[string, string][]} */ (Object.entries(found.versions));
  const looked = { title: t.doctor, columns: [t.name, t.status, t.detail, t.fix], rows: /** @type {unknown[][]} */ ([]) };
  const used = 1 - found.disk.free_bytes / found.disk.total_bytes;
  return {
    nodes: [
      card(t.servers, servers),
      h("div", { class: "columns even" }, card(t.versions, pairs(t.versions, versions)), card(t.disk, h("p", { class: used > 0.9 ? "bad" : "" }, `${size(found.disk.free_bytes)} ${t.free} (${percent(1 - used, 0)})`), h("meter", { min: "0", max: "1", high: "0.9", optimum: "0.3", value: String(used), "aria-label": t.disk }), pairs(t.files, files), h("p", { class: "note" }, found.newest_backup_at ? t.newestBackup(moment(found.newest_backup_at, place.zone)) : t.noBackup), h("p", { class: "note" }, t.kept(found.retention_days)))),
      doctor(place, looked),
    ],
    sheets: [looked, { title: t.servers, columns: [t.name, t.status, t.detail, "ms"], rows: rows.map((row) => [row.name, row.status, Object.values(row.problems).join("; "), row.took_ms]) }, { title: t.disk, columns: Object.keys(found.disk), rows: [Object.values(found.disk)] }, { title: t.versions, columns: [t.name, t.detail], rows: versions }, { title: t.files, columns: [t.name, "bytes"], rows: Object.entries(found.files) }],
  };
}

/** What `mogine doctor` says, looked up when it is asked for. @param {Place} place @param {Sheet} sheet gets it too */
function doctor(place, sheet) {
  const tone = { ok: "good", warning: "warn", error: "bad" };
  const columns = [
    { label: t.name, of: (/** @type {any} */ line) => line.name },
    { label: t.status, of: (/** @type {any} */ line) => line.status, show: (/** @type {any} */ status) => badge(status, tone[/** @type {"ok"} */ (status)]) },
    { label: t.detail, of: (/** @type {any} */ line) => line.detail },
    { label: t.fix, of: (/** @type {any} */ line) => line.fix || "–" },
  ];
  const box = h("div", { "aria-live": "polite" }, h("p", { class: "note" }, t.doctorHow));
  const look = async () => {
    box.replaceChildren(h("p", { class: "empty" }, t.loading));
    try {
      const found = await ask("doctor", {}, { json: {}, signal: place.signal });
      const order = ["error", "warning", "ok"];
      found.lines.sort((/** @type {any} */ a, /** @type {any} */ b) => order.indexOf(a.status) - order.indexOf(b.status));
      sheet.rows = found.lines.map((/** @type {any} */ line) => columns.map((c) => c.of(line)));
      box.replaceChildren(table(t.doctor, columns, found.lines));
    } catch (problem) {
      box.replaceChildren(h("p", { class: "bad" }, /** @type {Error} */ (problem).message));
    }
  };
  return card(t.doctor, h("button", { type: "button", class: "quiet", click: () => void look() }, t.look), box);
}
