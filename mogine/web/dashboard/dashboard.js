// The dashboard's frame: who is signed in, which screen, which range; the address says all of it.

import { h } from "../shared/dom.js";
import { Refused, ask } from "./api.js";
import { conversations, gaps } from "./conversations.js";
import { knowledge } from "./knowledge.js";
import { cost, overview, quality, system } from "./numbers.js";
import { saveSheets } from "./parts.js";
import { t } from "./words.js";

const SCREENS = { overview, conversations, gaps, knowledge, cost, quality, system };
const WITH_RANGE = ["overview", "conversations", "knowledge", "cost", "quality"];
const KEPT = ["days", "since", "until", "compare", "bots", "lang"];
const DAYS = ["1", "7", "30", "90"];

/**
 * @typedef {object} Place what a screen is shown for
 * @property {Record<string, string>} at the address's parameters
 * @property {Record<string, string>} range as the API takes it: days, or since and until
 * @property {boolean} compare
 * @property {boolean} bots
 * @property {string} zone
 * @property {(zone: string) => void} showZone
 * @property {AbortSignal} signal ends with the screen
 * @property {(at: Record<string, string>) => void} go to another screen or filter; the range stays
 * @property {() => void} again
 * @property {URL} [exportAddress] where "export" gets a whole file
 */

const app = /** @type {HTMLElement} */ (document.getElementById("app"));
let zone = "Asia/Shanghai";
/** @type {AbortController | null} */
let showing = null;

/** @returns {Record<string, string>} */
function address() {
  return Object.fromEntries(new URLSearchParams(location.search));
}

/** @param {Record<string, string>} at @returns {string} */
function hrefOf(at) {
  const kept = Object.fromEntries(Object.entries(address()).filter(([name]) => KEPT.includes(name)));
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...kept, ...at })) if (value !== "") query.set(name, value);
  return `?${query}`;
}

/** @param {Record<string, string>} at */
function go(at) {
  history.pushState(null, "", hrefOf(at));
  scrollTo(0, 0);
  void show();
}

// --- signing in ------------------------------------------------------------------------------------

/** @param {string} [problem] */
function showSignIn(problem = "") {
  document.title = `${t.signIn} · mogine`;
  const token = /** @type {HTMLInputElement} */ (h("input", { type: "password", name: "token", autocomplete: "current-password", required: true }));
  const told = h("p", { class: "bad", role: "alert" }, problem);
  const form = h(
    "form",
    {
      submit: async (/** @type {Event} */ event) => {
        event.preventDefault();
        try {
          await ask("session/token", {}, { json: {}, headers: { Authorization: `Bearer ${token.value.trim()}` } });
          token.value = "";
          void show();
        } catch (error) {
          told.textContent = error instanceof Refused && error.status === 401 ? t.badToken : String(/** @type {Error} */ (error).message);
          token.focus();
        }
      },
    },
    h("label", {}, h("span", {}, t.token), token),
    h("button", { type: "submit" }, t.signIn),
  );
  app.replaceChildren(h("main", { class: "sign-in card" }, h("h1", {}, "mogine"), told, h("p", {}, t.signInHow), h("pre", { tabindex: "0" }, h("code", {}, "mogine admin link")), h("p", {}, t.orToken), form));
}

/** The link of `mogine admin link` ends with #link=SECRET, which no server's log sees. */
async function redeemLink() {
  const link = /^#link=([\w-]+)$/.exec(location.hash)?.[1];
  if (!link) return "";
  history.replaceState(null, "", location.pathname + location.search);
  try {
    await ask("session", {}, { json: { link } });
    return "";
  } catch (error) {
    return error instanceof Refused && error.status === 404 ? t.badLink : String(/** @type {Error} */ (error).message);
  }
}

async function signOut() {
  await ask("session", {}, { method: "DELETE" }).catch(() => undefined);
  showing?.abort();
  showSignIn();
}

// --- the frame -------------------------------------------------------------------------------------

/** @param {string} view @param {Record<string, string>} at */
function frame(view, at) {
  const links = Object.entries(t.views).map(([name, label]) =>
    h("a", { href: hrefOf({ view: name }), "aria-current": name === view ? "page" : null, click: (event) => follow(event, { view: name }) }, label),
  );
  const bar = WITH_RANGE.includes(view) && !at.session && !at.id ? rangeBar(view, at) : null;
  const save = h("button", { type: "button", class: "quiet", id: "export" }, t.exportCsv);
  const content = h("div", { id: "content", "aria-live": "off" });
  app.replaceChildren(
    h("header", { class: "head" }, h("span", { class: "brand" }, "mogine"), h("nav", { "aria-label": "mogine" }, ...links), h("button", { type: "button", class: "quiet", click: () => void signOut() }, t.signOut)),
    h("main", {}, h("div", { class: "title" }, h("h1", {}, t.views[/** @type {"overview"} */ (view)]), save), bar, content),
  );
  app.querySelector("[aria-current]")?.scrollIntoView({ inline: "center", block: "nearest" });
  return { content, save };
}

/** @param {MouseEvent} event @param {Record<string, string>} at */
function follow(event, at) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  go(at);
}

/** @param {string} view @param {Record<string, string>} at */
function rangeBar(view, at) {
  const filters = Object.fromEntries(Object.entries(at).filter(([name]) => !KEPT.includes(name)));
  const days = at.since ? "" : at.days ?? "30";
  const choose = (/** @type {Record<string, string>} */ to) => go({ ...filters, view, days: "", since: "", until: "", ...to });
  const buttons = DAYS.map((each) => h("button", { type: "button", "aria-pressed": String(each === days), click: () => choose({ days: each }) }, each === "1" ? t.today : t.days(Number(each))));
  const custom = h(
    "form",
    {
      class: "custom",
      hidden: !at.since,
      submit: (/** @type {Event} */ event) => {
        event.preventDefault();
        const { since, until } = Object.fromEntries(new FormData(/** @type {HTMLFormElement} */ (custom)));
        if (since && until) choose({ since: String(since), until: String(until) });
      },
    },
    h("label", {}, h("span", {}, t.from), h("input", { type: "date", name: "since", value: at.since ?? "", required: true })),
    h("label", {}, h("span", {}, t.to), h("input", { type: "date", name: "until", value: at.until ?? "", required: true })),
    h("button", { type: "submit" }, t.apply),
  );
  const other = h("button", { type: "button", "aria-pressed": String(Boolean(at.since)), "aria-expanded": String(!custom.hidden), click: () => {
    custom.hidden = !custom.hidden;
    other.setAttribute("aria-expanded", String(!custom.hidden));
  } }, t.custom);
  const toggle = (/** @type {string} */ name, /** @type {string} */ label, /** @type {boolean} */ on, /** @type {string} */ off) => h("label", { class: "switch" }, h("input", { type: "checkbox", checked: on, change: (/** @type {Event} */ event) => go({ ...filters, view, [name]: /** @type {HTMLInputElement} */ (event.target).checked ? (off === "" ? "1" : "") : off }) }), h("span", {}, label));
  const switches = [
    ...(["overview", "cost", "quality"].includes(view) ? [toggle("compare", t.compare, at.compare !== "0", "0")] : []),
    ...(["overview", "conversations"].includes(view) ? [toggle("bots", t.bots, at.bots === "1", "")] : []),
  ];
  return h("div", { class: "range", role: "group", "aria-label": t.range }, h("div", { class: "tabs" }, ...buttons, other), custom, ...switches, h("span", { class: "zone", id: "zone" }, t.zone(zone)));
}

async function show() {
  showing?.abort();
  const { signal } = (showing = new AbortController());
  const at = address();
  const view = at.view && at.view in SCREENS ? /** @type {keyof typeof SCREENS} */ (at.view) : "overview";
  const { content, save } = frame(view, at);
  document.title = `${t.views[view]} · mogine`;
  content.setAttribute("aria-busy", "true");
  content.replaceChildren(h("p", { class: "empty", role: "status" }, t.loading));
  const range = at.since && at.until ? { since: at.since, until: at.until } : { days: at.days ?? "30" };
  /** @type {Place} */
  const place = {
    at, range, zone, signal, go,
    compare: at.compare !== "0",
    bots: at.bots === "1",
    again: () => void show(),
    showZone: (told) => {
      place.zone = zone = told;
      const label = document.getElementById("zone");
      if (label) label.textContent = t.zone(told);
    },
  };
  try {
    const { nodes, sheets } = await SCREENS[view](place);
    if (signal.aborted) return;
    content.replaceChildren(...nodes);
    save.hidden = sheets.length === 0 && !place.exportAddress;
    save.addEventListener("click", () => {
      if (place.exportAddress) location.href = place.exportAddress.href;
      else saveSheets(`mogine-${view}-${new Date().toISOString().slice(0, 10)}`, sheets);
    });
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof Refused && error.status === 401) return showSignIn();
    const message = error instanceof Error ? error.message : String(error);
    content.replaceChildren(h("div", { class: "card", role: "alert" }, h("p", { class: "bad" }, t.failed), h("p", {}, message), h("button", { type: "button", click: () => void show() }, t.again)));
  } finally {
    if (!signal.aborted) content.setAttribute("aria-busy", "false");
  }
}

async function start() {
  addEventListener("popstate", () => void show());
  addEventListener("hashchange", () => void start());
  const problem = await redeemLink();
  if (problem) showSignIn(problem);
  else await show();
}

void start();
