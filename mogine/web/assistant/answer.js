// One answer on the page: thoughts, text, sources, what can be done with it, and what went wrong.

import { ROOT, rate } from "../shared/api.js";
import { h, icon, iconButton } from "../shared/dom.js";
import { MarkdownView, externalLink, safeAddress } from "../shared/markdown.js";
import { fill, problemText } from "./words.js";

/**
 * @typedef {object} Citation
 * @property {number} number
 * @property {string} title
 * @property {string} source
 * @property {string} heading
 * @property {string} url
 * @property {string} excerpt
 *
 * @typedef {ReturnType<typeof import("./words.js").wordsFor>["words"]} Words
 * @typedef {import("../shared/api.js").ChatConfig["handoff"]} Handoff
 */

let answers = 0;

export class AnswerView {
  /** What goes into the page. */
  element = document.createElement("article");
  #words;
  #id = `answer-${(answers += 1)}`;
  #text = "";
  #reasoning = "";
  #ended = false;
  #frame = 0;
  /** @type {Map<number, Citation>} */
  #citations = new Map();
  /** @type {Map<number, HTMLDetailsElement>} */
  #sources = new Map();
  #thoughts = document.createElement("details");
  #thoughtsText = document.createElement("div");
  #body = document.createElement("div");
  #markdown;

  /** @param {Words} words */
  constructor(words) {
    this.#words = words;
    this.element.className = "answer working";
    this.element.setAttribute("aria-label", words.assistant);
    this.element.setAttribute("aria-busy", "true");
    this.#thoughts.className = "thoughts";
    this.#thoughts.hidden = true;
    this.#thoughtsText.dir = "auto";
    this.#thoughtsText.tabIndex = 0; // so that a keyboard can scroll it
    this.#thoughts.append(h("summary", {}, words.thinking), this.#thoughtsText);
    this.#body.className = "prose";
    this.#body.dir = "auto";
    this.#markdown = new MarkdownView(this.#body, (number) => this.#mark(number));
    const dots = h("p", { class: "dots", "aria-hidden": "true" }, h("span"), h("span"), h("span"));
    this.element.append(this.#thoughts, dots, this.#body);
  }

  get isEmpty() {
    return this.#text === "";
  }

  get text() {
    return this.#text;
  }

  /** @param {Citation[]} citations */
  setCitations(citations) {
    this.#citations = new Map(citations.map((citation) => [citation.number, citation]));
  }

  /** @param {string} text */
  addReasoning(text) {
    this.#reasoning += text;
    this.#draw();
  }

  /** @param {string} text */
  addText(text) {
    this.#text += text;
    this.#draw();
  }

  /** The answer is over, for whichever reason. @param {string} [note] a word on how it ended */
  end(note = "") {
    this.#ended = true;
    cancelAnimationFrame(this.#frame);
    this.#render();
    this.element.classList.remove("working");
    this.element.removeAttribute("aria-busy");
    const summary = this.#thoughts.querySelector("summary");
    if (summary) summary.textContent = this.#words.thoughts;
    if (this.#text !== "" && this.#citations.size > 0) this.element.append(this.#listSources());
    if (note !== "") this.element.append(h("p", { class: "ending" }, note));
  }

  /**
   * @param {import("../shared/api.js").ApiError} error
   * @param {() => void} retry
   */
  fail(error, retry) {
    this.end();
    const button = /** @type {HTMLButtonElement} */ (h("button", { type: "button", click: retry }, this.#words.retry));
    const box = h("div", { class: "problem" }, h("p", {}, problemText(this.#words, error)), button);
    if (error.requestId) box.append(h("small", {}, fill(this.#words.requestId, { id: error.requestId })));
    if (error.retryAfterS > 0) countDown(button, error.retryAfterS, this.#words);
    this.element.append(box);
  }

  /**
   * The way to a person.
   * @param {Handoff | undefined} handoff @param {boolean} nothingFound
   * @param {{requestId: string, sessionId: string}} of
   */
  offerPerson(handoff, nothingFound, of) {
    if (this.element.querySelector(".handoff") || !handoff) return;
    const { contacts = [], picture = "", text = "" } = handoff;
    if (contacts.length === 0 && picture === "" && text === "") return;
    const words = this.#words;
    const card = h("aside", { class: "handoff", "aria-label": words.handoff }, h("h2", {}, words.handoff));
    card.append(h("p", {}, text || (nothingFound ? words.handoffText : "")));
    if (contacts.length > 0) card.append(h("ul", {}, ...contacts.map((each) => h("li", {}, contact(String(each))))));
    if (picture !== "") {
      const image = h("img", { src: new URL(picture, ROOT).href, alt: words.picture, loading: "lazy" });
      image.addEventListener("error", () => figure.remove());
      const figure = h("figure", {}, image, h("figcaption", {}, words.picture));
      card.append(figure);
    }
    card.addEventListener("click", (event) => {
      if (!of.requestId || !(/** @type {HTMLElement} */ (event.target).closest("a"))) return;
      // For the owner's list of what the documents do not answer; nothing is lost without it.
      void rate({ request_id: of.requestId, session_id: of.sessionId, handoff: true }).catch(() => undefined);
      of = { ...of, requestId: "" };
    });
    this.element.append(card);
  }

  /**
   * Copy, and a thumb for an answer that has come to its end.
   * @param {{requestId: string, sessionId: string, rating: string}} of
   * @param {(rating: "up" | "down") => void} rated
   */
  offerActions(of, rated) {
    const words = this.#words;
    const copy = iconButton("copy", words.copy, async () => {
      if (!(await copyText(this.#text))) return;
      copy.replaceChildren(icon("check"));
      copy.setAttribute("aria-label", words.copied);
      setTimeout(() => {
        copy.replaceChildren(icon("copy"));
        copy.setAttribute("aria-label", words.copy);
      }, 2000);
    });
    const row = h("div", { class: "actions" }, copy);
    if (of.requestId) {
      const status = h("span", { role: "status" });
      const box = h("div", { class: "rating" });
      const thumb = (/** @type {"up" | "down"} */ rating) => {
        const name = rating === "up" ? words.good : words.bad;
        const button = iconButton(rating === "up" ? "up" : "thumbdown", name, () => give(rating));
        button.setAttribute("aria-pressed", String(of.rating === rating));
        return button;
      };
      const buttons = { up: thumb("up"), down: thumb("down") };
      const tell = async (/** @type {"up" | "down"} */ rating, reason = "", comment = "") => {
        try {
          await rate({ request_id: of.requestId, session_id: of.sessionId, rating, reason, comment });
        } catch {
          status.textContent = words.notRated;
          return;
        }
        rated(rating);
        for (const [name, button] of Object.entries(buttons)) {
          button.setAttribute("aria-pressed", String(name === rating));
        }
        status.textContent = rating === "up" || reason ? words.thanks : "";
      };
      let told = Promise.resolve();
      // The thumb goes out at once, since few say why; with the reason it comes again, and the last one counts.
      const give = (/** @type {"up" | "down"} */ rating, reason = "", comment = "") => {
        told = told.then(() => tell(rating, reason, comment));
        box.replaceChildren();
        if (rating === "down" && !reason) {
          box.append(this.#askWhy((why, text) => give("down", why, text)));
          box.scrollIntoView({ block: "nearest" });
        }
      };
      row.append(buttons.up, buttons.down, status);
      row.append(box);
    }
    this.element.append(row);
  }

  /** @param {(reason: string, comment: string) => void} tell */
  #askWhy(tell) {
    const words = this.#words;
    const name = `${this.#id}-why`;
    const choices = Object.entries(words.reasons).map(([value, text]) =>
      h("label", {}, h("input", { type: "radio", name, value }), h("span", {}, text)),
    );
    const comment = h("input", { type: "text", maxlength: "1000", placeholder: words.comment, "aria-label": words.comment, dir: "auto" });
    const form = h(
      "form",
      {
        submit: (/** @type {Event} */ event) => {
          event.preventDefault();
          const chosen = /** @type {HTMLInputElement | null} */ (form.querySelector("input:checked"));
          tell(chosen?.value ?? "other", /** @type {HTMLInputElement} */ (comment).value);
        },
      },
      h("fieldset", {}, h("legend", {}, words.why), ...choices),
      h("div", { class: "tell" }, comment, h("button", { type: "submit" }, words.sendRating)),
    );
    return form;
  }

  /** Many pieces may come within one frame; the page is drawn once for all of them. */
  #draw() {
    if (this.#frame === 0) {
      this.#frame = requestAnimationFrame(() => {
        this.#frame = 0;
        if (!this.#ended) this.#render();
      });
    }
  }

  #render() {
    this.element.classList.toggle("writing", !this.#ended && this.#text !== "");
    this.#thoughts.hidden = this.#reasoning.trim() === "";
    if (this.#thoughtsText.textContent !== this.#reasoning) this.#thoughtsText.textContent = this.#reasoning;
    this.#markdown.update(this.#text, !this.#ended);
    this.element.dispatchEvent(new CustomEvent("drawn", { bubbles: true }));
  }

  /** @param {number} number @returns {Node | null} a link to the passage, if there is one */
  #mark(number) {
    const citation = this.#citations.get(number);
    if (!citation) return null;
    const title = citation.title || citation.source;
    const label = fill(this.#words.source, { number, title });
    const click = (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#open(number);
    };
    return h("a", { class: "cite", href: `#${this.#sourceId(number)}`, title, "aria-label": label, click }, String(number));
  }

  /** @param {number} number */
  #sourceId(number) {
    return `${this.#id}-source-${number}`;
  }

  /** @param {number} number */
  #open(number) {
    const source = this.#sources.get(number);
    if (!source) return; // the sources follow when the answer is whole
    source.open = true;
    source.scrollIntoView({ block: "nearest" });
    source.querySelector("summary")?.focus();
  }

  #listSources() {
    const heading = h("h2", { id: `${this.#id}-sources` }, this.#words.sources);
    const section = h("section", { class: "sources", "aria-labelledby": heading.id });
    const list = document.createElement("ol");
    for (const citation of this.#citations.values()) list.append(h("li", {}, this.#source(citation)));
    section.append(heading, list);
    return section;
  }

  /** @param {Citation} citation */
  #source(citation) {
    const details = document.createElement("details");
    details.id = this.#sourceId(citation.number);
    this.#sources.set(citation.number, details);
    const summary = h(
      "summary",
      {},
      h("span", { class: "number" }, String(citation.number)),
      h("span", { class: "name" }, citation.title || citation.source),
    );
    if (citation.heading && citation.heading !== citation.title) {
      summary.append(h("span", { class: "where" }, citation.heading));
    }
    const excerpt = h("blockquote", { dir: "auto", tabindex: "0" });
    new MarkdownView(excerpt, () => null).update(citation.excerpt, false);
    details.append(summary, excerpt);
    const address = safeAddress(citation.url ?? "");
    if (address) {
      const link = externalLink(address);
      link.textContent = this.#words.openSource;
      details.append(link);
    }
    return details;
  }
}

/** @param {string} text @returns {Node} a link where it is a number or an address */
function contact(text) {
  const link = (/** @type {string} */ href, /** @type {"phone" | "mail"} */ picture) =>
    h("a", { href }, icon(picture), text);
  if (/^[^\s@]+@[^\s@]+\.[^\s@]+$/.test(text)) return link(`mailto:${text}`, "mail");
  if (/^\+?[\d ()-]{5,24}$/.test(text)) return link(`tel:${text.replace(/[^\d+]/g, "")}`, "phone");
  const address = /^https?:\/\//.test(text) ? safeAddress(text) : null;
  if (address === null) return h("span", { dir: "auto" }, text);
  const external = externalLink(address);
  external.textContent = text;
  return external;
}

/** @param {string} text @returns {Promise<boolean>} */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No TLS, or an old browser: the way before.
    const area = /** @type {HTMLTextAreaElement} */ (h("textarea", { readonly: true, class: "hidden-visually" }));
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** @param {HTMLButtonElement} button @param {number} seconds @param {Words} words */
function countDown(button, seconds, words) {
  const until = Date.now() + seconds * 1000;
  const show = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? fill(words.retryIn, { seconds: left }) : words.retry;
    if (left > 0) setTimeout(show, 250);
  };
  show();
}
