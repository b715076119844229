// The chat page: the assistant at reading width, beside the visitor's own conversations.

import { Assistant } from "../assistant/assistant.js";
import { Store } from "../assistant/store.js";
import { dress } from "../assistant/theme.js";
import { ROOT, loadConfig } from "../shared/api.js";
import { h, iconButton } from "../shared/dom.js";
import { saveConversation } from "../assistant/keep.js";

// As in page.css: where the list lies over the page.
const NARROW = "(max-width: 859px)";

const store = new Store(ROOT);
store.tidy();
const assistant = new Assistant({ languages: navigator.languages, store, changed: showList });
let { words } = assistant;

const title = h("h1", { id: "title" }, words.title);
const list = h("ul", { id: "conversations" });
const listTitle = h("h2", { id: "list-title" });
const fresh = h("button", { id: "fresh", class: "quiet", type: "button", click: startAfresh });
const showSide = iconButton("list", "", () => openSide(!document.body.classList.contains("with-side")));
const save = iconButton("save", "", () => saveConversation(assistant));
const remove = iconButton("trash", "", () => {
  assistant.clear();
  showList();
  assistant.focus();
});
const side = h("nav", { id: "side", "aria-labelledby": "list-title" }, listTitle, list);
const app = /** @type {HTMLElement} */ (document.getElementById("app"));

/** @param {boolean} open on a narrow screen, where the list lies over the page */
function openSide(open) {
  document.body.classList.toggle("with-side", open);
  showSide.setAttribute("aria-expanded", String(open));
  assistant.element.inert = open;
  if (open) /** @type {HTMLElement | null} */ (list.querySelector("button"))?.focus();
  else if (side.contains(document.activeElement)) showSide.focus();
}

function startAfresh() {
  assistant.startAfresh();
  openSide(false);
  assistant.focus();
}

function showList() {
  const current = assistant.conversation.id;
  const items = store.list().map((conversation) => {
    const shown = conversation.turns[0]?.question ?? "";
    const time = new Date(conversation.at).toLocaleString(assistant.language, { dateStyle: "short", timeStyle: "short" });
    const choose = () => {
      store.setCurrent(conversation.id);
      assistant.open(store.load(conversation.id));
      openSide(false);
      showList();
      assistant.focus();
    };
    const isCurrent = conversation.id === current ? "true" : null;
    return h("li", {}, h("button", { type: "button", click: choose, "aria-current": isCurrent }, h("span", { dir: "auto" }, shown), h("time", {}, time)));
  });
  list.replaceChildren(...items);
  listTitle.textContent = items.length > 0 ? words.conversations : words.none;
  const isEmpty = assistant.conversation.turns.length === 0;
  for (const button of [save, remove]) button.hidden = isEmpty;
  fresh.hidden = isEmpty;
}

/** @param {Partial<import("../shared/api.js").ChatConfig>} config */
function showWords(config) {
  words = assistant.words;
  document.documentElement.lang = assistant.language;
  title.textContent = document.title = config.title || words.title;
  fresh.textContent = words.fresh;
  for (const [button, name] of /** @type {[HTMLElement, string][]} */ ([[showSide, words.showList], [save, words.save], [remove, words.clear]])) {
    button.setAttribute("aria-label", name);
    button.title = name;
  }
  showList();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  if (event.isComposing) return;
  const writing = event.target instanceof HTMLElement && /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    assistant.focus();
  } else if (event.key === "Escape") {
    if (document.body.classList.contains("with-side")) openSide(false);
    else if (assistant.isRunning) assistant.stop();
    else assistant.focus();
  }
}

async function start() {
  showWords({});
  app.append(
    side,
    h("header", { class: "top" }, showSide, title, save, remove, fresh),
    h("main", { id: "main" }, assistant.element),
  );
  document.getElementById("plain")?.remove();
  app.hidden = false;
  document.addEventListener("keydown", onKey);
  document.getElementById("main")?.addEventListener("click", () => openSide(false));
  matchMedia(NARROW).addEventListener("change", () => openSide(false));
  addEventListener("storage", showList);
  const asked = new URLSearchParams(location.search).get("q");
  // The page works without its configuration: the words of its own stand in.
  const configured = loadConfig(assistant.language).catch(() => ({}));
  if (asked === null) assistant.open(store.current());
  else {
    store.setCurrent(null);
    assistant.open(null);
    assistant.prefill(asked);
  }
  showList();
  assistant.focus();
  const config = await configured;
  assistant.configure(config);
  dress(document.body, config);
  showWords(config);
}

void start();
