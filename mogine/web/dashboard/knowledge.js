// The knowledge base: what is in it, what a search finds, and the generations.

import { h } from "../shared/dom.js";
import { ask } from "./api.js";
import { badge, card, duration, moment, number, size, table } from "./parts.js";
import { t } from "./words.js";

/** @typedef {import("./dashboard.js").Place} Place */

/** @param {Place} place @returns {Promise<import("./numbers.js").Screen>} */
export async function knowledge(place) {
  const { signal } = place;
  const nobody = { documents: [], generation: "" };
  const problem = h("p", { class: "note bad", role: "alert" });
  const told = (/** @type {any} */ error) => {
    if (error.status === 401 || signal.aborted) throw error;
    problem.textContent = error.message || t.kbDown;
    return null;
  };
  const [documents, generations, numbers] = await Promise.all([
    ask("kb/documents", {}, { signal }).catch(told),
    ask("kb/generations", {}, { signal }).catch(told),
    ask("statistics", place.range, { signal }),
  ]);
  const hits = new Map(numbers.by_source.map((/** @type {any} */ row) => [row.source, row]));
  place.showZone(numbers.window.timezone);
  const rows = (documents ?? nobody).documents.map((/** @type {any} */ each) => ({ ...each, of: hits.get(each.source) }));
  rows.sort((/** @type {any} */ a, /** @type {any} */ b) => (b.of?.questions ?? 0) - (a.of?.questions ?? 0));
  const columns = [
    { label: t.title, of: (/** @type {any} */ row) => row.title || row.source },
    { label: t.source, of: (/** @type {any} */ row) => row.source },
    { label: t.hits, of: (/** @type {any} */ row) => row.of?.questions ?? 0, kind: /** @type {const} */ ("number"), show: number },
    { label: t.thumbs, of: (/** @type {any} */ row) => `${row.of?.thumbs_up ?? 0} / ${row.of?.thumbs_down ?? 0}`, kind: /** @type {const} */ ("number") },
    { label: t.pieces, of: (/** @type {any} */ row) => row.passage_count, kind: /** @type {const} */ ("number"), show: number },
    { label: t.characters, of: (/** @type {any} */ row) => row.characters, kind: /** @type {const} */ ("number"), show: number },
    { label: t.remove, of: () => "", show: (/** @type {any} */ _, /** @type {any} */ row) => removeButton(row, place, problem) },
  ];
  const detail = h("div");
  const list = table(t.documents, columns, rows, { empty: documents ? t.noDocuments : t.kbDown, bars: 2, pick: (row) => void showPassages(row, detail, place) });
  return {
    nodes: [
      problem,
      searchBox(place),
      card(`${t.documents} (${number(rows.length)})`, uploadForm(place), list, detail),
      card(t.generations, generationTable(generations?.generations ?? [], place, problem)),
    ],
    sheets: [{ title: t.documents, columns: columns.slice(0, -1).map((c) => c.label), rows: rows.map((/** @type {any} */ row) => columns.slice(0, -1).map((c) => c.of(row))) }, { title: t.generations, columns: [t.generation, t.created, t.documents, t.pieces, t.bytes, t.serves], rows: (generations?.generations ?? []).map((/** @type {any} */ row) => [row.name, row.created_at, row.documents, row.passages, row.bytes, row.serves ? t.yes : t.no]) }],
  };
}

/** @param {Place} place */
function searchBox(place) {
  const results = h("div", { "aria-live": "polite" });
  const form = h(
    "form",
    {
      class: "filters",
      role: "search",
      submit: async (/** @type {Event} */ event) => {
        event.preventDefault();
        const q = String(new FormData(/** @type {HTMLFormElement} */ (form)).get("q") ?? "").trim();
        if (q === "") return;
        results.replaceChildren(h("p", { class: "empty" }, t.loading));
        try {
          const found = await ask("kb/search", { q, top_k: 8 }, { signal: place.signal });
          results.replaceChildren(h("p", { class: "note" }, `${t.generation} ${found.generation} · ${t.took} ${duration(found.took_ms)}`), hitList(found.results));
        } catch (problem) {
          results.replaceChildren(h("p", { class: "bad" }, /** @type {Error} */ (problem).message));
        }
      },
    },
    h("label", { class: "wide" }, h("span", {}, t.searchKb), h("input", { type: "search", name: "q", maxlength: "1000", dir: "auto" })),
    h("button", { type: "submit" }, t.search),
  );
  return h("div", {}, form, results);
}

/** @param {any[]} results */
function hitList(results) {
  if (results.length === 0) return h("p", { class: "empty" }, t.nothing);
  return h("ol", { class: "hits" }, ...results.map((hit) => {
    const meter = h("meter", { min: "0", max: "1", value: String(hit.score), "aria-label": `${t.score} ${number(hit.score)}` });
    return h("li", { class: "card" }, h("h2", { dir: "auto" }, [hit.title, hit.heading].filter(Boolean).join(" › ") || hit.source), h("p", { class: "facts" }, meter, ` ${number(hit.score)} · `, h("span", { dir: "auto" }, hit.source)), h("blockquote", { dir: "auto" }, hit.text));
  }));
}

/** @param {any} row @param {HTMLElement} box @param {Place} place */
async function showPassages(row, box, place) {
  const found = await ask(`kb/documents/${encodeURIComponent(row.id)}`, {}, { signal: place.signal });
  const passages = found.passages.map((/** @type {any} */ passage) => h("li", {}, passage.heading ? h("h3", { dir: "auto" }, passage.heading) : null, h("blockquote", { dir: "auto" }, passage.text)));
  box.replaceChildren(h("h2", { tabindex: "-1", dir: "auto" }, `${t.pieces}: ${found.title || found.source}`), h("ol", { class: "passages" }, ...passages));
  /** @type {HTMLElement} */ (box.firstChild).focus();
}

/** @param {any} row @param {Place} place @param {HTMLElement} problem */
function removeButton(row, place, problem) {
  const remove = async () => {
    if (!confirm(t.removeSure(row.title || row.source))) return;
    try {
      await ask(`kb/documents/${encodeURIComponent(row.id)}`, {}, { method: "DELETE" });
      place.again();
    } catch (error) {
      problem.textContent = /** @type {Error} */ (error).message;
    }
  };
  return h("button", { type: "button", class: "quiet", "aria-label": `${t.remove}: ${row.title || row.source}`, click: () => void remove() }, t.remove);
}

/** @param {Place} place */
function uploadForm(place) {
  const status = h("p", { class: "note", role: "status" }, t.dropHere);
  const input = /** @type {HTMLInputElement} */ (h("input", { type: "file", multiple: true, name: "file", id: "upload", class: "hidden-visually" }));
  const send = async (/** @type {FileList} */ files) => {
    const body = new FormData();
    for (const file of files) body.append("file", file, file.name);
    status.textContent = t.uploading;
    status.className = "note";
    try {
      const done = await ask("kb/documents", {}, { method: "POST", body });
      status.textContent = [t.uploaded(done.documents.length), ...done.notes].join(" · ");
      place.again();
    } catch (error) {
      status.textContent = /** @type {Error} */ (error).message;
      status.className = "note bad";
    }
    input.value = "";
  };
  input.addEventListener("change", () => input.files && input.files.length > 0 && void send(input.files));
  const box = h("div", { class: "upload" }, input, h("label", { for: "upload", class: "button" }, t.upload), status);
  box.addEventListener("dragover", (event) => event.preventDefault());
  box.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer && event.dataTransfer.files.length > 0) void send(event.dataTransfer.files);
  });
  return box;
}

/** @param {any[]} rows @param {Place} place @param {HTMLElement} problem */
function generationTable(rows, place, problem) {
  const back = async (/** @type {string} */ generation) => {
    if (!confirm(t.rollbackSure(generation))) return;
    try {
      await ask("kb/rollback", {}, { json: { generation } });
      place.again();
    } catch (error) {
      problem.textContent = /** @type {Error} */ (error).message;
    }
  };
  return table(
    t.generations,
    [
      { label: t.generation, of: (row) => row.name },
      { label: t.created, of: (row) => row.created_at, kind: "when", show: (iso) => moment(iso, place.zone) },
      { label: t.documents, of: (row) => row.documents, kind: "number", show: number },
      { label: t.pieces, of: (row) => row.passages, kind: "number", show: number },
      { label: t.bytes, of: (row) => row.bytes, kind: "number", show: size },
      { label: t.status, of: (row) => row.serves, show: (serves, row) => (serves ? badge(t.serves, "good") : row.problem ? badge(t.damaged, "bad") : h("button", { type: "button", class: "quiet", "aria-label": `${t.rollback}: ${row.name}`, click: () => void back(row.name) }, t.rollback)) },
    ],
    rows,
  );
}
