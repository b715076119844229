// The screens of texts: the list of questions, one conversation as the visitor saw it, and the gaps.

import { h } from "../shared/dom.js";
import { MarkdownView, externalLink, safeAddress } from "../shared/markdown.js";
import { addressOf, ask } from "./api.js";
import { questionTable } from "./numbers.js";
import { badge, card, defined, duration, moment, number, table, yuan } from "./parts.js";
import { t } from "./words.js";

const PAGE = 50;
const AROUND_MS = 5000;
const LOOK_AGAIN_MS = 1500;

/** @typedef {import("./dashboard.js").Place} Place @typedef {import("./numbers.js").Screen} Screen */

/** @param {Place} place @returns {Promise<Screen>} */
export async function conversations(place) {
  if (place.at.session || place.at.id) return { nodes: await conversation(place), sheets: [] };
  const filters = { ...dates(place), q: place.at.q, status: place.at.status, answered: place.at.answered, feedback: place.at.feedback, provider: place.at.provider, bot: place.bots ? "" : "no" };
  const first = await ask("queries", { limit: PAGE, ...filters }, { signal: place.signal });
  const box = h("div");
  const rows = [...first.queries];
  let next = first.next;
  const show = () => {
    const more = h("button", { type: "button", class: "more", click: () => void further() }, t.more);
    box.replaceChildren(questionTable(rows, place), ...(next ? [more] : []));
  };
  const further = async () => {
    const page = await ask("queries", { limit: PAGE, before: next, ...filters }, { signal: place.signal });
    rows.push(...page.queries);
    next = page.next;
    show();
  };
  show();
  place.exportAddress = addressOf("export", { format: "csv", ...filters });
  return { nodes: [filterForm(place), card(t.views.conversations, box)], sheets: [] };
}

/** The range as days of the address. @param {Place} place */
function dates(place) {
  if (place.range.since) return { since: place.range.since, until: place.range.until };
  const today = new Intl.DateTimeFormat("en-CA", { timeZone: place.zone }).format(new Date());
  const since = new Date(Date.parse(`${today}T00:00:00Z`) - (Number(place.range.days ?? 30) - 1) * 86_400_000);
  return { since: since.toISOString().slice(0, 10), until: today };
}

/** @param {Place} place */
function filterForm(place) {
  const choice = (/** @type {string} */ name, /** @type {string} */ label, /** @type {Record<string, string>} */ options) => {
    const select = h("select", { name }, ...[["", t.all], ...Object.entries(options)].map(([value, text]) => h("option", { value, selected: value === (place.at[name] ?? "") }, text)));
    return h("label", {}, h("span", {}, label), select);
  };
  const form = h(
    "form",
    {
      class: "filters",
      role: "search",
      submit: (/** @type {Event} */ event) => {
        event.preventDefault();
        place.go({ view: "conversations", ...Object.fromEntries(new FormData(/** @type {HTMLFormElement} */ (form))) });
      },
      change: (/** @type {Event} */ event) => event.target instanceof HTMLSelectElement && /** @type {HTMLFormElement} */ (form).requestSubmit(),
    },
    h("label", { class: "wide" }, h("span", {}, t.search), h("input", { type: "search", name: "q", maxlength: "100", value: place.at.q ?? "", placeholder: t.searchText })),
    choice("status", t.status, t.statuses),
    choice("answered", t.answered, { yes: t.yes, no: t.no, unknown: t.unknown }),
    choice("feedback", t.rating, t.ratings),
    choice("provider", t.provider, { doubao: "doubao", dashscope: "dashscope", openai: "openai", extract: "extract" }),
    h("button", { type: "submit" }, t.search),
  );
  return form;
}

/** @param {Place} place @returns {Promise<Node[]>} */
async function conversation(place) {
  const { session, id } = place.at;
  let rows = [];
  if (session) rows = (await ask("queries", { session, limit: 200 }, { signal: place.signal })).queries;
  else {
    // An id begins with the moment of its question, in milliseconds.
    const at = Number.parseInt(String(id).slice(0, 12), 16) || 0;
    const [since, until] = [at - AROUND_MS, at + AROUND_MS].map((ms) => new Date(ms).toISOString());
    const page = await ask("queries", { since, until, limit: 1000 }, { signal: place.signal });
    rows = page.queries.filter((/** @type {any} */ row) => row.id === id);
  }
  const back = h("button", { type: "button", class: "back", click: () => history.back() }, `← ${t.back}`);
  if (rows.length === 0) return [back, h("p", { class: "empty" }, t.nothing)];
  const turns = rows.reverse().map((/** @type {any} */ row) => turn(row, place, row.id === id));
  return [back, card(t.conversation, h("div", { class: "turns" }, ...turns))];
}

/** @param {any} row @param {Place} place @param {boolean} isOpen */
function turn(row, place, isOpen) {
  const prose = h("div", { class: "prose", dir: "auto" });
  const known = new Map(row.citations.map((/** @type {any} */ citation) => [citation.number, citation]));
  const mark = (/** @type {number} */ at) => (known.has(at) ? h("sup", { class: "cite", title: known.get(at).title || known.get(at).source }, String(at)) : null);
  new MarkdownView(prose, mark).update(row.answer, false);
  const passages = table(
    t.passages,
    [
      { label: "#", of: (c) => c.number },
      { label: t.title, of: (c) => c.title || c.source, show: (title, c) => link(c.url, `${title}${c.heading ? ` › ${c.heading}` : ""}`) },
      { label: t.source, of: (c) => c.source },
      { label: t.score, of: (c) => c.score, kind: "number", show: number },
    ],
    row.citations,
  );
  const tokens = [row.prompt_tokens, row.completion_tokens, row.reasoning_tokens].map(number).join(" / ");
  const facts = /** @type {[string, string][]} */ ([
    [t.time, moment(row.started_at, place.zone)],
    [t.status, t.statuses[/** @type {"ok"} */ (row.status)] + (row.error_type ? ` (${row.error_type})` : "")],
    [t.answered, t[/** @type {"yes"} */ (row.answered)] ?? row.answered],
    [t.provider, [row.provider, row.model].filter(Boolean).join(" / ")],
    [t.searchTime, duration(row.search_ms)],
    [t.firstWord, duration(row.first_token_ms)],
    [t.total, duration(row.duration_ms)],
    [t.tokens, tokens + (row.tokens_estimated ? ` (${t.estimated})` : "")],
    [t.cost, yuan(row.cost_cny)],
    [t.page, row.page_url || "–"],
    [t.rating, row.feedback ? t.ratings[/** @type {"up"} */ (row.feedback)] : "–"],
    [t.visitor, row.visitor.slice(0, 12) || "–"],
    [t.requestId, row.id],
  ]);
  const trace = h("details", { class: "trace", open: isOpen }, h("summary", {}, `${t.trace}: ${duration(row.first_token_ms)} · ${yuan(row.cost_cny)}`), h("dl", {}, ...facts.flatMap(([name, value]) => [h("dt", {}, defined(name)), h("dd", { dir: "auto" }, value)])), row.citations.length > 0 ? h("h3", {}, t.passages) : null, row.citations.length > 0 ? passages : null);
  return h("article", {}, h("p", { class: "asked", dir: "auto" }, row.question || t.noText), row.answer ? prose : h("p", { class: "empty" }, row.error_type || t.noText), trace);
}

/** @param {string} url @param {string} text */
function link(url, text) {
  const address = safeAddress(url ?? "");
  if (address === null) return text;
  const anchor = externalLink(address);
  anchor.textContent = text;
  return anchor;
}

/** @param {Place} place @returns {Promise<Screen>} */
export async function gaps(place) {
  const { signal } = place;
  const status = place.at.status && place.at.status in t.gapStates ? place.at.status : "todo";
  const load = () => ask("gaps", { status, limit: 200 }, { signal });
  const [first, documents] = await Promise.all([load(), ask("kb/documents", {}, { signal }).catch(() => ({ documents: [] }))]);
  const names = documents.documents.map((/** @type {any} */ document) => document.source);
  const sheet = { title: t.views.gaps, columns: ["id", "status", "question", "visitors", "asked", "weight", "last_at", "nearest", "score", "reason"], rows: /** @type {unknown[][]} */ ([]) };
  const box = h("div", { class: "looked" });
  const tab = (/** @type {any} */ counts, /** @type {string} */ state, /** @type {string} */ label) => {
    const count = state === "todo" ? (counts.open ?? 0) + (counts.accepted ?? 0) : state === "all" ? Object.values(counts).reduce((sum, n) => sum + n, 0) : counts[state] ?? 0;
    return h("button", { type: "button", "aria-pressed": String(state === status), click: () => place.go({ view: "gaps", status: state }) }, `${label} ${number(count)}`);
  };
  const draw = (/** @type {any} */ found) => {
    const items = found.gaps.map((/** @type {any} */ gap) => gapItem(gap, place, renew));
    sheet.rows = found.gaps.map((/** @type {any} */ gap) => [gap.id, gap.status, gap.question, gap.visitors, gap.asked, gap.weight, gap.last_at, gap.nearest?.source, gap.nearest?.score, gap.reason]);
    box.replaceChildren(
      h("div", { class: "tabs" }, ...Object.entries(t.gapStates).map(([state, label]) => tab(found.counts, state, label))),
      h("p", { class: "note", role: "status" }, found.looking && items.length > 0 ? t.looking : ""),
      found.problem ? h("p", { class: "note bad" }, found.problem) : "",
      items.length > 0 ? h("ul", { class: "gaps" }, ...items) : h("p", { class: "empty card", role: found.looking ? "status" : null }, found.looking ? t.looking : t.nothing),
    );
    if (found.looking) setTimeout(() => void watch(), LOOK_AGAIN_MS);
  };
  const renew = async () => {
    draw(await load());
    /** @type {HTMLElement | null} */ (box.querySelector("[aria-pressed=true]"))?.focus();
  };
  // What a look finds comes in by itself, but never under the hands of who writes or reads something here.
  const watch = async () => {
    const found = signal.aborted ? null : await load().catch(() => null);
    if (signal.aborted) return;
    if (found === null || found.looking || box.querySelector("form, .quoted")) setTimeout(() => void watch(), LOOK_AGAIN_MS);
    else draw(found);
  };
  draw(first);
  return {
    nodes: [h("p", { class: "lead" }, t.gapsLead), h("datalist", { id: "documents" }, ...names.map((/** @type {string} */ value) => h("option", { value }))), box],
    sheets: [sheet],
  };
}

/** @param {any} gap @param {Place} place @param {() => Promise<void>} renew shows the list as it is then */
function gapItem(gap, place, renew) {
  const tone = { open: "warn", accepted: "", closed: "good", ignored: "" };
  const signals = Object.entries(gap.signals).map(([name, count]) => badge(`${t.signals[/** @type {"declined"} */ (name)] ?? name} ${count}`));
  const error = h("p", { class: "bad", role: "alert" });
  const act = async (/** @type {string} */ what, /** @type {object} */ body) => {
    item.setAttribute("aria-busy", "true");
    try {
      await ask(`gaps/${gap.id}/${what}`, {}, { json: body });
      await renew();
    } catch (problem) {
      error.textContent = String(/** @type {Error} */ (problem).message);
    } finally {
      item.removeAttribute("aria-busy");
    }
  };
  const room = h("div");
  const form = (/** @type {string} */ what, /** @type {HTMLElement[]} */ fields) => {
    const made = h(
      "form",
      {
        class: "inline",
        submit: (/** @type {Event} */ event) => {
          event.preventDefault();
          const values = [...new FormData(/** @type {HTMLFormElement} */ (made))].filter(([, value]) => String(value).trim() !== "");
          void act(what, Object.fromEntries(values));
        },
      },
      ...fields,
      h("button", { type: "submit" }, t.save),
      h("button", { type: "button", class: "quiet", click: () => room.replaceChildren() }, t.cancel),
    );
    room.replaceChildren(made);
    /** @type {HTMLElement | null} */ (made.querySelector("input"))?.focus();
  };
  const field = (/** @type {string} */ name, /** @type {string} */ label, /** @type {Record<string, any>} */ more = {}) => h("label", {}, h("span", {}, label), h("input", { name, dir: "auto", ...more }));
  const accept = () => form("accept", [field("expect", t.expect, { list: "documents", required: true, value: gap.test?.expect ?? "" }), field("contains", t.contains)]);
  const ignore = () => form("ignore", [field("reason", t.reason, { required: true, maxlength: "300" })]);
  const showQuestions = async () => {
    const detail = await ask(`gaps/${gap.id}`, {}, { signal: place.signal });
    room.replaceChildren(h("ul", { class: "quoted" }, ...detail.questions.map((/** @type {any} */ one) => h("li", {}, h("button", { type: "button", class: "pick", dir: "auto", click: () => place.go({ view: "conversations", id: one.id }) }, one.question), h("small", {}, moment(one.at, place.zone))))));
  };
  const buttons = [
    ...(gap.status === "open" || gap.status === "accepted" ? [h("button", { type: "button", click: accept }, t.accept), h("button", { type: "button", class: "quiet", click: ignore }, t.ignore)] : []),
    ...(gap.status !== "open" ? [h("button", { type: "button", class: "quiet", click: () => void act("reopen", {}) }, t.reopen)] : []),
    h("button", { type: "button", class: "quiet", click: () => void showQuestions() }, t.showQuestions),
  ];
  const proof = gap.evidence ? h("p", { class: "proof" }, `${t.evidence}: `, badge(gap.evidence.passed ? t.passed : t.notPassed, gap.evidence.passed ? "good" : "warn"), ` ${gap.evidence.generation}${gap.evidence.rank ? `, ${t.rank} ${gap.evidence.rank}` : ""} ${gap.evidence.why ?? ""}`) : null;
  const near = gap.nearest?.source ? h("p", { class: "near", dir: "auto" }, `${t.nearest}: ${gap.nearest.title || gap.nearest.source} (${number(gap.nearest.score)})`) : null;
  const item = h(
    "li",
    { class: "card gap" },
    h("h2", { dir: "auto" }, gap.question),
    h("p", { class: "facts" }, badge(t.gapStates[/** @type {"open"} */ (gap.status)], tone[/** @type {"open"} */ (gap.status)]), ` ${t.askedBy(number(gap.visitors), number(gap.asked))} · ${t.lastAsked} ${moment(gap.last_at, place.zone)} `, ...signals),
    near,
    gap.test ? h("p", { dir: "auto" }, `${t.expect}: ${gap.test.expect ?? ""}`) : null,
    proof,
    gap.reason ? h("p", { dir: "auto" }, `${t.reason}: ${gap.reason}`) : null,
    h("div", { class: "buttons" }, ...buttons),
    room,
    error,
  );
  return item;
}
