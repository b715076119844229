// The chat page: takes a question, shows the answer as it comes, one at a time.

import { ApiError, ask, loadConfig, newSessionId } from "../shared/api.js";
import { AnswerView, textElement } from "./answer.js";
import { fill, wordsFor } from "./words.js";

// The page lies at <prefix>/chat/, whatever the prefix is.
const ROOT = new URL("../", document.baseURI);
const NEAR_THE_END_PX = 80;

const $ = (/** @type {string} */ id) => /** @type {HTMLElement} */ (document.getElementById(id));
const question = /** @type {HTMLTextAreaElement} */ ($("question"));
const send = /** @type {HTMLButtonElement} */ ($("send"));
const scroller = $("scroller");
const log = $("log");

let { language, words } = wordsFor(navigator.languages);
let maxQuestionChars = 8000;
let sessionId = newSessionId();
/** @type {AbortController | null} */
let running = null;
let following = true;

/** @param {string} text */
async function submit(text) {
  const asked = text.trim();
  if (asked === "" || running || isTooLong(asked)) return;
  question.value = "";
  showLimit();
  fitQuestion();
  $("welcome").hidden = true;
  $("fresh").hidden = false;
  const turn = textElement("div", "", "turn");
  const bubble = textElement("div", asked, "question");
  bubble.dir = "auto";
  bubble.setAttribute("aria-label", `${words.you}: ${asked}`);
  bubble.setAttribute("role", "article");
  turn.append(bubble);
  log.append(turn);
  await answer(asked, turn);
}

/** @param {string} asked @param {HTMLElement} turn the answer is put at its end */
async function answer(asked, turn) {
  const view = new AnswerView(words);
  turn.append(view.element);
  const stop = new AbortController();
  setRunning(stop);
  say(words.working);
  follow();
  try {
    const body = { question: asked, session_id: sessionId, page_url: location.href.split(/[?#]/)[0] };
    let reason = "";
    for await (const { event, data } of ask(ROOT, body, stop.signal)) {
      if (event === "citations") view.setCitations(citationsOf(data));
      else if (event === "reasoning") view.addReasoning(String(data?.text ?? ""));
      else if (event === "delta") view.addText(String(data?.text ?? ""));
      else if (event === "done") {
        reason = String(data?.finish_reason ?? "");
        // The server gives a new id where it does not go on with ours.
        if (data?.session_id && running === stop) sessionId = String(data.session_id);
      }
    }
    view.end(endingOf(reason, view.isEmpty));
    say(words.answered);
  } catch (error) {
    if (stop.signal.aborted) {
      view.end(words.stopped);
      say(words.stopped);
    } else {
      const told = error instanceof ApiError ? error : new ApiError("unknown", String(error));
      view.fail(told, () => {
        if (running) return;
        view.element.remove();
        void answer(asked, turn);
      });
    }
  } finally {
    if (running === stop) setRunning(null);
    follow();
  }
}

/** @param {string} reason @param {boolean} isEmpty */
function endingOf(reason, isEmpty) {
  if (reason === "length") return words.cutShort;
  if (reason === "content_filter") return words.withheld;
  return isEmpty ? words.nothing : "";
}

/** @param {any} data @returns {import("./answer.js").Citation[]} */
function citationsOf(data) {
  const items = data?.citations;
  if (!Array.isArray(items)) return [];
  return items.map((item) => ({
    number: Number(item?.number),
    title: String(item?.title ?? ""),
    source: String(item?.source ?? ""),
    heading: String(item?.heading ?? ""),
    url: String(item?.url ?? ""),
    excerpt: String(item?.excerpt ?? ""),
  }));
}

/** @param {AbortController | null} stop */
function setRunning(stop) {
  running = stop;
  document.body.classList.toggle("busy", stop !== null);
  send.setAttribute("aria-label", stop ? words.stop : words.send);
  send.title = stop ? words.stop : words.send;
  updateSend();
}

function startAfresh() {
  running?.abort();
  setRunning(null);
  sessionId = newSessionId();
  log.replaceChildren();
  $("welcome").hidden = false;
  $("fresh").hidden = true;
  say("");
  question.focus();
}

// --- the question -----------------------------------------------------------------------------------

/** @param {string} text */
function isTooLong(text) {
  return lengthOf(text) > maxQuestionChars;
}

/** @param {string} text its length as the server counts: characters, not UTF-16 units */
function lengthOf(text) {
  return text.length > maxQuestionChars ? Array.from(text).length : text.length;
}

function showLimit() {
  const text = question.value.trim();
  $("limit").textContent = isTooLong(text)
    ? fill(words.tooLong, { length: lengthOf(text), limit: maxQuestionChars })
    : "";
  question.setAttribute("aria-invalid", String(isTooLong(text)));
  updateSend();
}

function updateSend() {
  const text = question.value.trim();
  send.disabled = !running && (text === "" || isTooLong(text));
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  keepUp();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  // While an input method composes, Enter picks a word; Safari tells so by key code 229 alone.
  const composing = event.isComposing || event.keyCode === 229;
  if (event.key !== "Enter" || event.shiftKey || event.ctrlKey || event.altKey || event.metaKey || composing) return;
  event.preventDefault();
  void submit(question.value);
}

// --- the page ---------------------------------------------------------------------------------------

/** @param {string} text for screen readers */
function say(text) {
  $("status").textContent = text;
}

function isNearTheEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_THE_END_PX;
}

function follow() {
  following = true;
  keepUp();
}

function keepUp() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
  $("latest").hidden = following || isNearTheEnd();
}

function showWords() {
  document.documentElement.lang = language;
  document.title = words.title;
  $("title").textContent = words.title;
  $("greeting").textContent = words.greeting;
  $("fresh").textContent = words.fresh;
  $("latest").setAttribute("aria-label", words.latest);
  $("latest").title = words.latest;
  $("notice").textContent = words.notice;
  $("hint").textContent = words.hint;
  $("starters").setAttribute("aria-label", words.starters);
  question.placeholder = words.placeholder;
  const label = document.querySelector("label[for=question]");
  if (label) label.textContent = words.placeholder;
}

/** @param {Partial<import("../shared/api.js").ChatConfig>} config */
function showConfig(config) {
  ({ language, words } = wordsFor(navigator.languages, config.language));
  showWords();
  if (config.title) {
    document.title = config.title;
    $("title").textContent = config.title;
  }
  if (config.greeting) $("greeting").textContent = config.greeting;
  if (config.ai_notice) $("notice").textContent = config.ai_notice;
  if (Number(config.max_question_chars) > 0) maxQuestionChars = Number(config.max_question_chars);
  const starters = Array.isArray(config.starters) ? config.starters : [];
  $("starters").replaceChildren(
    ...starters.map((starter) => {
      const button = /** @type {HTMLButtonElement} */ (textElement("button", String(starter)));
      button.type = "button";
      button.dir = "auto";
      button.addEventListener("click", () => void submit(String(starter)));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  setRunning(running);
}

async function start() {
  showWords();
  setRunning(null);
  const footer = document.querySelector("footer");
  if (footer) footer.hidden = false;
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else void submit(question.value);
  });
  question.addEventListener("keydown", onKey);
  question.addEventListener("input", () => {
    fitQuestion();
    showLimit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) running?.abort();
  });
  $("fresh").addEventListener("click", startAfresh);
  $("latest").addEventListener("click", follow);
  scroller.addEventListener("scroll", () => {
    following = isNearTheEnd();
    $("latest").hidden = following;
  });
  log.addEventListener("drawn", keepUp);
  question.focus();
  // The page works without its configuration: the words of its own stand in.
  const config = await loadConfig(ROOT).catch(() => ({}));
  showConfig(config);
  if (log.childElementCount === 0) $("welcome").hidden = false;
}

void start();
