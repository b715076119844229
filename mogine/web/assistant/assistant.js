// A conversation: takes a question, shows the answer as it comes, one at a time, and remembers both.

import { ApiError, ask, newId, resume, stop } from "../shared/api.js";
import { h, icon, iconButton } from "../shared/dom.js";
import { safeAddress } from "../shared/markdown.js";
import { AnswerView } from "./answer.js";
import { fill, wordsFor } from "./words.js";

const NEAR_THE_END_PX = 80;
const SAVE_EVERY_MS = 400;

/**
 * @typedef {import("./store.js").Turn} Turn
 * @typedef {import("./store.js").Conversation} Conversation
 * @typedef {Partial<import("../shared/api.js").ChatConfig>} Config
 */

export class Assistant {
  /** What goes into the page. */
  element = h("div", { class: "assistant" });
  #languages;
  #store;
  #changed;
  #config = /** @type {Config} */ ({});
  /** @type {Conversation} */
  #conversation = emptyConversation();
  /** @type {{abort: AbortController, turn: Turn} | null} */
  #running = null;
  #following = true;
  #savedAt = 0;
  #lastQuestion = "";
  /** @type {(() => void)[] | null} what needs the configuration, until that is there */
  #waiting = [];

  #log = h("div", { id: "log", role: "log" });
  #greeting = h("p", { id: "greeting", dir: "auto" });
  #starters = h("ul", { id: "starters" });
  #welcome = h("section", { id: "welcome", hidden: true }, this.#greeting, this.#starters);
  #scroller = h("div", { class: "scroller", tabindex: "0" }, this.#welcome, this.#log);
  #question = /** @type {HTMLTextAreaElement} */ (
    h("textarea", { id: "question", name: "question", rows: "1", dir: "auto", enterkeyhint: "send", "aria-describedby": "limit" })
  );
  #send = /** @type {HTMLButtonElement} */ (
    h("button", { id: "send", class: "round", type: "submit" }, icon("send", "when-idle"), stopIcon())
  );
  #latest = iconButton("down", "", () => this.#follow(), "latest");
  #limit = h("p", { id: "limit", class: "limit", role: "alert" });
  #notice = h("span", { id: "notice" });
  #privacy = h("span", { id: "privacy" });
  #hint = h("span", { id: "hint", class: "hint" });
  #status = h("p", { id: "status", class: "hidden-visually", role: "status" });

  /**
   * @param {object} options
   * @param {readonly string[]} options.languages in order of preference
   * @param {import("./store.js").Store} options.store
   * @param {(conversation: Conversation, isRunning: boolean) => void} [options.changed]
   */
  constructor({ languages, store, changed = () => {} }) {
    this.#languages = languages;
    this.#store = store;
    this.#changed = changed;
    ({ language: this.language, words: this.words } = wordsFor(languages));
    this.#latest.id = "latest";
    this.#latest.hidden = true;
    const composer = h("form", { id: "composer", autocomplete: "off" }, this.#question, this.#send);
    const fine = h("p", { class: "fine" }, this.#notice, " ", this.#privacy, " ", this.#hint);
    this.element.append(this.#scroller, h("div", { class: "bottom" }, this.#latest, composer, this.#limit, fine), this.#status);
    composer.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.stop();
      else void this.submit(this.#question.value);
    });
    this.#question.addEventListener("keydown", (event) => this.#onKey(event));
    this.#question.addEventListener("input", () => {
      this.#fitQuestion();
      this.#showLimit();
    });
    this.#scroller.addEventListener("scroll", () => {
      this.#following = this.#isNearTheEnd();
      this.#latest.hidden = this.#following;
    });
    this.#log.addEventListener("drawn", () => this.#keepUp());
    addEventListener("pagehide", () => this.#save(true));
    this.#showWords();
  }

  get isRunning() {
    return this.#running !== null;
  }

  get conversation() {
    return this.#conversation;
  }

  get #maxChars() {
    return Number(this.#config.max_question_chars) > 0 ? Number(this.#config.max_question_chars) : 8000;
  }

  /** @param {Config} config as the server told it */
  configure(config) {
    this.#config = config;
    ({ language: this.language, words: this.words } = wordsFor(this.#languages, config.language));
    this.#showWords();
    for (const offer of this.#waiting ?? []) offer();
    this.#waiting = null;
    this.#keepUp();
  }

  focus() {
    this.#question.focus();
  }

  /** @param {string} text stands in the field, not sent yet */
  prefill(text) {
    this.#question.value = text;
    this.#fitQuestion();
    this.#showLimit();
  }

  /** Show a conversation, or a new one; an answer that was running goes on. @param {Conversation | null} conversation */
  open(conversation) {
    this.#leave();
    this.#conversation = conversation ?? emptyConversation();
    this.#log.replaceChildren();
    for (const turn of this.#conversation.turns) {
      const shown = this.#showQuestion(turn);
      if (turn.state === "running" && turn === this.#conversation.turns.at(-1) && turn.requestId) {
        void this.#answer(turn, shown, true);
      } else this.#showPast(turn, shown);
    }
    this.#welcome.hidden = this.#conversation.turns.length > 0;
    this.#setRunning(this.#running);
    this.#follow();
  }

  /** A new conversation. */
  startAfresh() {
    this.stop();
    this.#store.setCurrent(null);
    this.open(null);
    this.say("");
    this.#changed(this.#conversation, false);
  }

  /** End the running answer; what came of it stays. */
  stop() {
    const running = this.#running;
    if (!running) return;
    running.turn.state = "stopped";
    running.abort.abort("stop");
    if (running.turn.requestId) stop(this.#place(running.turn));
  }

  /** Take this conversation off the browser. */
  clear() {
    this.stop();
    const { id } = this.#conversation;
    this.#conversation = emptyConversation();
    this.#store.remove(id);
    this.startAfresh();
    this.say(this.words.cleared);
  }

  /** The conversation as Markdown, for the visitor to keep. */
  exportText() {
    const title = this.#config.title || this.words.title;
    const parts = this.#conversation.turns.map((turn) => {
      const time = new Date(turn.at).toLocaleString(this.language);
      const sources = turn.citations.map((c) => `[${c.number}] ${c.title || c.source}${c.url ? ` <${c.url}>` : ""}`);
      const told = sources.length > 0 && turn.answer ? `\n\n${this.words.sources}:\n${sources.join("\n")}` : "";
      return `## ${turn.question}\n\n_${fill(this.words.askedAt, { time })}_\n\n${turn.answer}${told}`;
    });
    return `# ${title}\n\n${parts.join("\n\n")}\n`;
  }

  /** @param {string} text */
  async submit(text) {
    const asked = text.trim();
    if (asked === "" || this.#running || this.#isTooLong(asked)) return;
    this.#question.value = "";
    this.#lastQuestion = asked;
    this.#showLimit();
    this.#fitQuestion();
    this.#welcome.hidden = true;
    const turn = newTurn(asked);
    this.#conversation.turns.push(turn);
    await this.#answer(turn, this.#showQuestion(turn), false);
  }

  /** @param {string} text for screen readers */
  say(text) {
    this.#status.textContent = text;
  }

  // --- one turn -------------------------------------------------------------------------------------

  /** @param {Turn} turn */
  #showQuestion(turn) {
    const bubble = h("div", { class: "question", dir: "auto", role: "article", "aria-label": `${this.words.you}: ${turn.question}` }, turn.question);
    const shown = h("div", { class: "turn" }, bubble);
    this.#log.append(shown);
    return shown;
  }

  /** @param {Turn} turn @param {HTMLElement} shown the answer is put at its end @param {boolean} goesOn */
  async #answer(turn, shown, goesOn) {
    const view = new AnswerView(this.words);
    shown.append(view.element);
    const abort = new AbortController();
    const running = { abort, turn };
    this.#setRunning(running);
    if (goesOn) this.#fillView(view, turn);
    this.say(goesOn ? this.words.resumed : this.words.working);
    this.#follow();
    this.#save(true);
    try {
      const body = { question: turn.question, session_id: this.#conversation.session, page_url: location.href.split(/[?#]/)[0] };
      const events = goesOn ? resume(this.#place(turn), abort.signal) : ask(body, abort.signal);
      for await (const event of events) this.#take(event, turn, view);
      turn.state = "done";
      view.end(this.#endingOf(turn));
      this.say(this.words.answered);
      this.#offer(turn, view);
    } catch (error) {
      if (abort.signal.reason === "leave") return; // another page, or tab, goes on with it
      if (abort.signal.aborted) {
        turn.state = "stopped";
        view.end(this.words.stopped);
        this.say(this.words.stopped);
      } else {
        turn.state = "failed";
        this.#fail(turn, view, shown, error instanceof ApiError ? error : new ApiError("unknown", String(error)));
      }
    } finally {
      if (this.#running === running) {
        this.#setRunning(null);
        this.#save(true);
      }
      this.#keepUp();
    }
  }

  /** @param {import("../shared/api.js").AnswerEvent} event @param {Turn} turn @param {AnswerView} view */
  #take({ event, data, id }, turn, view) {
    turn.last = id || turn.last;
    if (event === "start") {
      turn.requestId = String(data?.request_id ?? "");
      // The server gives a new id where it does not go on with ours.
      if (data?.session_id) this.#conversation.session = String(data.session_id);
    } else if (event === "citations") {
      turn.citations = citationsOf(data);
      view.setCitations(turn.citations);
    } else if (event === "reasoning") {
      turn.reasoning += String(data?.text ?? "");
      view.addReasoning(String(data?.text ?? ""));
    } else if (event === "delta") {
      turn.answer += String(data?.text ?? "");
      view.addText(String(data?.text ?? ""));
    } else if (event === "done") {
      turn.ending = String(data?.finish_reason ?? "");
      turn.answered = String(data?.answered ?? "unknown");
      turn.requestId = String(data?.request_id ?? turn.requestId);
      if (data?.session_id) this.#conversation.session = String(data.session_id);
    }
    this.#save(event === "start");
  }

  /** @param {Turn} turn @param {HTMLElement} shown */
  #showPast(turn, shown) {
    const view = new AnswerView(this.words);
    shown.append(view.element);
    this.#fillView(view, turn);
    if (turn.state === "done") {
      view.end(this.#endingOf(turn));
      this.#offer(turn, view);
    } else if (turn.state === "stopped") view.end(this.words.stopped);
    else this.#fail(turn, view, shown, new ApiError("cut", ""));
  }

  /** @param {AnswerView} view @param {Turn} turn */
  #fillView(view, turn) {
    view.setCitations(turn.citations);
    view.addReasoning(turn.reasoning);
    view.addText(turn.answer);
  }

  /** @param {Turn} turn @param {AnswerView} view @param {HTMLElement} shown @param {ApiError} error */
  #fail(turn, view, shown, error) {
    view.fail(error, () => {
      if (this.#running) return;
      view.element.remove();
      Object.assign(turn, newTurn(turn.question), { id: turn.id, at: turn.at });
      void this.#answer(turn, shown, false);
    });
    if (error.reason === "budget_exhausted" || error.status >= 500) this.#offerPerson(turn, view, false);
  }

  /** @param {Turn} turn @param {AnswerView} view @param {boolean} nothingFound */
  #offerPerson(turn, view, nothingFound) {
    const of = { requestId: turn.requestId, sessionId: this.#conversation.session };
    const offer = () => view.offerPerson(this.#config.handoff, nothingFound, of);
    if (this.#waiting) this.#waiting.push(offer);
    else offer();
  }

  /** @param {Turn} turn @param {AnswerView} view */
  #offer(turn, view) {
    if (turn.answer === "") return;
    if (turn.answered === "no") this.#offerPerson(turn, view, true);
    const of = { requestId: turn.requestId, sessionId: this.#conversation.session, rating: turn.rating };
    view.offerActions(of, (rating) => {
      turn.rating = rating;
      this.#save(true);
      if (rating === "down") this.#offerPerson(turn, view, false);
    });
  }

  /** @param {Turn} turn */
  #endingOf(turn) {
    if (turn.ending === "length") return this.words.cutShort;
    if (turn.ending === "content_filter") return this.words.withheld;
    return turn.answer === "" ? this.words.nothing : "";
  }

  /** @param {Turn} turn */
  #place(turn) {
    return { requestId: turn.requestId, sessionId: this.#conversation.session, last: turn.last };
  }

  /** Stop showing, without an end to the answer. */
  #leave() {
    this.#running?.abort.abort("leave");
    this.#save(true);
    this.#running = null;
  }

  /** @param {boolean} now not only when some time has passed */
  #save(now) {
    if (this.#conversation.turns.length === 0 || (!now && Date.now() - this.#savedAt < SAVE_EVERY_MS)) return;
    this.#savedAt = Date.now();
    this.#store.save(this.#conversation);
    if (now) this.#changed(this.#conversation, this.#running !== null);
  }

  /** @param {{abort: AbortController, turn: Turn} | null} running */
  #setRunning(running) {
    this.#running = running;
    this.element.classList.toggle("busy", running !== null);
    const name = running ? this.words.stop : this.words.send;
    this.#send.setAttribute("aria-label", name);
    this.#send.title = name;
    this.#updateSend();
  }

  // --- the question ---------------------------------------------------------------------------------

  /** @param {string} text */
  #isTooLong(text) {
    return this.#lengthOf(text) > this.#maxChars;
  }

  /** @param {string} text its length as the server counts: characters, not UTF-16 units */
  #lengthOf(text) {
    return text.length > this.#maxChars ? Array.from(text).length : text.length;
  }

  #showLimit() {
    const text = this.#question.value.trim();
    const tooLong = this.#isTooLong(text);
    this.#limit.textContent = tooLong ? fill(this.words.tooLong, { length: this.#lengthOf(text), limit: this.#maxChars }) : "";
    this.#question.setAttribute("aria-invalid", String(tooLong));
    this.#updateSend();
  }

  #updateSend() {
    const text = this.#question.value.trim();
    this.#send.disabled = !this.#running && (text === "" || this.#isTooLong(text));
  }

  #fitQuestion() {
    this.#question.style.height = "auto";
    this.#question.style.height = `${this.#question.scrollHeight}px`;
    this.#keepUp();
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    // While an input method composes, Enter picks a word; Safari tells so by key code 229 alone.
    if (event.isComposing || event.keyCode === 229) return;
    const plain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
    if (event.key === "Enter" && plain) {
      event.preventDefault();
      void this.submit(this.#question.value);
    } else if (event.key === "ArrowUp" && plain && this.#question.value === "") {
      const last = this.#conversation.turns.at(-1)?.question ?? this.#lastQuestion;
      if (last) {
        event.preventDefault();
        this.prefill(last);
      }
    }
  }

  // --- the view -------------------------------------------------------------------------------------

  #isNearTheEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_THE_END_PX;
  }

  #follow() {
    this.#following = true;
    this.#keepUp();
  }

  #keepUp() {
    if (this.#following) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#latest.hidden = this.#following || this.#isNearTheEnd();
  }

  #showWords() {
    const { words } = this;
    const config = this.#config;
    this.element.lang = this.language;
    this.#scroller.setAttribute("aria-label", config.title || words.title);
    this.#scroller.setAttribute("role", "region");
    this.#greeting.textContent = config.greeting || words.greeting;
    this.#latest.setAttribute("aria-label", words.latest);
    this.#latest.title = words.latest;
    this.#notice.textContent = config.ai_notice || words.notice;
    this.#privacy.replaceChildren(config.privacy?.text || words.privacy);
    const address = safeAddress(config.privacy?.url ?? "");
    if (address) {
      this.#privacy.append(" ", h("a", { href: address, target: "_blank", rel: "noopener" }, words.privacyLink));
    }
    this.#hint.textContent = words.hint;
    this.#question.placeholder = words.placeholder;
    this.#question.setAttribute("aria-label", words.placeholder);
    this.#starters.setAttribute("aria-label", words.starters);
    const starters = Array.isArray(config.starters) ? config.starters.map(String) : [];
    const button = (/** @type {string} */ text) =>
      h("li", {}, h("button", { type: "button", dir: "auto", click: () => void this.submit(text) }, text));
    this.#starters.hidden = starters.length === 0;
    this.#starters.replaceChildren(...starters.map(button));
    this.#setRunning(this.#running);
  }
}

function stopIcon() {
  const svg = icon("close", "when-busy");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of Object.entries({ x: "5.5", y: "5.5", width: "9", height: "9", rx: "1.5" })) {
    rect.setAttribute(name, value);
  }
  svg.replaceChildren(rect);
  return svg;
}

/** @returns {Conversation} */
function emptyConversation() {
  return { id: newId(), session: newId(), at: Date.now(), turns: [] };
}

/** @param {string} question @returns {Turn} */
function newTurn(question) {
  return {
    ...{ id: newId().slice(0, 16), at: Date.now(), question, answer: "", reasoning: "", citations: [] },
    ...{ state: "running", ending: "", answered: "unknown", requestId: "", last: "", rating: "" },
  };
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
