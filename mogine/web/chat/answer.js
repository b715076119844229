// One answer on the page: thoughts, text, sources, and what went wrong; a view without any network.

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
    this.#thoughts.append(textElement("summary", words.thinking), this.#thoughtsText);
    this.#body.className = "prose";
    this.#body.dir = "auto";
    this.#markdown = new MarkdownView(this.#body, (number) => this.#mark(number));
    const dots = textElement("p", "", "dots");
    dots.append(document.createElement("span"), document.createElement("span"), document.createElement("span"));
    dots.setAttribute("aria-hidden", "true");
    this.element.append(this.#thoughts, dots, this.#body);
  }

  get isEmpty() {
    return this.#text === "";
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
    if (this.#text !== "" && this.#citations.size > 0) this.element.append(this.#sources());
    if (note !== "") this.element.append(textElement("p", note, "ending"));
  }

  /**
   * @param {import("../shared/api.js").ApiError} error
   * @param {() => void} retry
   */
  fail(error, retry) {
    this.end();
    const box = textElement("div", "", "problem");
    box.append(textElement("p", problemText(this.#words, error)));
    const button = /** @type {HTMLButtonElement} */ (textElement("button", this.#words.retry));
    button.type = "button";
    button.addEventListener("click", retry);
    box.append(button);
    if (error.requestId) {
      box.append(textElement("small", fill(this.#words.requestId, { id: error.requestId })));
    }
    if (error.retryAfterS > 0) countDown(button, error.retryAfterS, this.#words);
    this.element.append(box);
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
    const link = /** @type {HTMLAnchorElement} */ (textElement("a", String(number), "cite"));
    link.href = `#${this.#sourceId(number)}`;
    link.title = citation.title || citation.source;
    link.setAttribute("aria-label", fill(this.#words.source, { number, title: link.title }));
    link.addEventListener("click", (event) => {
      event.preventDefault();
      this.#open(number);
    });
    return link;
  }

  /** @param {number} number */
  #sourceId(number) {
    return `${this.#id}-source-${number}`;
  }

  /** @param {number} number */
  #open(number) {
    const source = document.getElementById(this.#sourceId(number));
    if (!(source instanceof HTMLDetailsElement)) return; // the sources follow when the answer is whole
    source.open = true;
    source.scrollIntoView({ block: "nearest" });
    source.querySelector("summary")?.focus();
  }

  #sources() {
    const section = document.createElement("section");
    section.className = "sources";
    const heading = textElement("h2", this.#words.sources);
    heading.id = `${this.#id}-sources`;
    section.setAttribute("aria-labelledby", heading.id);
    const list = document.createElement("ol");
    for (const citation of this.#citations.values()) {
      const item = document.createElement("li");
      item.append(this.#source(citation));
      list.append(item);
    }
    section.append(heading, list);
    return section;
  }

  /** @param {Citation} citation */
  #source(citation) {
    const details = document.createElement("details");
    details.id = this.#sourceId(citation.number);
    const summary = document.createElement("summary");
    summary.append(
      textElement("span", String(citation.number), "number"),
      textElement("span", citation.title || citation.source, "name"),
    );
    if (citation.heading && citation.heading !== citation.title) {
      summary.append(textElement("span", citation.heading, "where"));
    }
    const excerpt = textElement("blockquote", citation.excerpt);
    excerpt.dir = "auto";
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

/** @param {string} tag @param {string} text @param {string} [className] @returns {HTMLElement} */
export function textElement(tag, text, className = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  return node;
}
