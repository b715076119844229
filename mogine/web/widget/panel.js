// The widget's panel: a window beside the bubble, on a phone a sheet over the page.

import { Assistant } from "../assistant/assistant.js";
import { saveConversation } from "../assistant/keep.js";
import { Store } from "../assistant/store.js";
import { dress } from "../assistant/theme.js";
import { ROOT, loadConfig } from "../shared/api.js";
import { h, icon, iconButton } from "../shared/dom.js";

const SHEETS = ["shared/tokens.css", "assistant/assistant.css", "widget/panel.css"];
const ASSETS = new URL("../", import.meta.url);
const PHONE = "(max-width: 479px)";

/**
 * @typedef {object} Options
 * @property {HTMLElement} host
 * @property {ShadowRoot} shadow
 * @property {HTMLElement} bubble
 * @property {any} look
 * @property {string} title
 * @property {string[]} languages
 * @property {boolean} wanted whether the visitor pressed the bubble just now
 */

/** @type {Promise<Panel> | null} */
let made = null;

/** Show the panel; made at the first call. @param {Options} options */
export async function start(options) {
  made ??= make(options);
  const panel = await made;
  if (options.wanted || panel.store.awake) panel.open(options.wanted);
}

/** @param {Options} options */
async function make(options) {
  await Promise.all(SHEETS.map((path) => sheet(options.shadow, new URL(path, ASSETS).href)));
  return new Panel(options);
}

/** @param {ShadowRoot} shadow @param {string} href */
function sheet(shadow, href) {
  const link = /** @type {HTMLLinkElement} */ (h("link", { rel: "stylesheet", href }));
  return new Promise((resolve, reject) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", () => reject(new Error(href)));
    shadow.append(link);
  });
}

class Panel {
  store = new Store(ROOT);
  #bubble;
  #phone = matchMedia(PHONE);
  #assistant;
  #title = h("h1", { id: "title" });
  #menu = h("div", { class: "menu", id: "menu", hidden: true });
  #more;
  #element;
  #pushed = false;
  #overflow = "";
  #look;

  /** @param {Options} options */
  constructor({ shadow, bubble, look, title, languages }) {
    this.store.tidy();
    this.#bubble = bubble;
    this.#look = look;
    this.#assistant = new Assistant({ languages, store: this.store, changed: () => this.#showMenu() });
    this.#more = iconButton("menu", "", () => this.#openMenu(this.#menu.hidden));
    this.#more.setAttribute("aria-controls", "menu");
    const close = iconButton("close", "", () => this.close());
    close.id = "close";
    this.#element = h(
      "div",
      { class: `mogine panel ${look.position === "left" ? "left" : "right"}`, role: "dialog", "aria-labelledby": "title", hidden: true },
      h("header", { class: "top" }, this.#title, this.#more, close, this.#menu),
      this.#assistant.element,
    );
    dress(this.#element, look);
    shadow.append(this.#element);
    this.#showWords({ title });
    this.#element.addEventListener("keydown", (event) => this.#onKey(event));
    this.#element.addEventListener("click", (event) => {
      if (!this.#more.contains(/** @type {Node} */ (event.target))) this.#openMenu(false);
    });
    addEventListener("popstate", () => {
      if (this.#pushed) {
        this.#pushed = false;
        this.close();
      }
    });
    this.#phone.addEventListener("change", () => this.#fit());
    visualViewport?.addEventListener("resize", () => this.#fit());
    visualViewport?.addEventListener("scroll", () => this.#fit());
    this.#assistant.open(this.store.current());
    // The panel works without its configuration: the words of its own stand in.
    void loadConfig(this.#assistant.language)
      .catch(() => ({}))
      .then((config) => {
        this.#assistant.configure(config);
        this.#showWords({ title, ...config });
      });
  }

  /** @param {boolean} focus whether the visitor asked for it */
  open(focus) {
    if (!this.#element.hidden) return;
    this.#element.hidden = false;
    this.#bubble.hidden = true;
    this.#bubble.setAttribute("aria-expanded", "true");
    this.store.awake = true;
    if (this.#phone.matches) {
      // The back button of a phone closes what lies over the page.
      history.pushState({ mogine: true }, "");
      this.#pushed = true;
    }
    this.#fit();
    if (focus) this.#assistant.focus();
  }

  close() {
    if (this.#element.hidden) return;
    this.#element.hidden = true;
    this.#bubble.hidden = false;
    this.#bubble.setAttribute("aria-expanded", "false");
    // An answer that runs goes on, on the next page too, but the panel stays closed there.
    this.store.awake = false;
    this.#fit();
    this.#bubble.focus();
    if (this.#pushed) {
      this.#pushed = false;
      history.back();
    }
  }

  /** As a sheet the panel is as high as what the keyboard leaves, and the page behind stays where it is. */
  #fit() {
    const sheet = this.#phone.matches && !this.#element.hidden;
    const { documentElement } = document;
    if (sheet && this.#overflow === "") {
      this.#overflow = documentElement.style.overflow || "none set";
      documentElement.style.overflow = "hidden";
    } else if (!sheet && this.#overflow !== "") {
      documentElement.style.overflow = this.#overflow === "none set" ? "" : this.#overflow;
      this.#overflow = "";
    }
    this.#element.setAttribute("aria-modal", String(sheet));
    const view = visualViewport;
    const covered = sheet && view && view.scale === 1 && innerHeight - view.height > 1;
    this.#element.style.height = covered ? `${view.height}px` : "";
    this.#element.style.top = covered ? `${view.offsetTop}px` : "";
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    event.stopPropagation(); // the keys of the page around are not meant
    if (event.isComposing) return;
    if (event.key === "Escape") {
      if (!this.#menu.hidden) this.#openMenu(false, true);
      else if (this.#assistant.isRunning) this.#assistant.stop();
      else this.close();
    } else if (event.key === "Tab" && this.#phone.matches) this.#keepFocus(event);
  }

  /** @param {KeyboardEvent} event a sheet hides the page, so the focus must not go there */
  #keepFocus(event) {
    const all = [...this.#element.querySelectorAll("a[href], button:not(:disabled), textarea, input, summary, [tabindex='0']")];
    const shown = /** @type {HTMLElement[]} */ (all.filter((node) => node.getClientRects().length > 0));
    const at = /** @type {ShadowRoot} */ (this.#element.getRootNode()).activeElement;
    const [first, last] = [shown[0], shown[shown.length - 1]];
    if (at === (event.shiftKey ? first : last)) {
      event.preventDefault();
      (event.shiftKey ? last : first)?.focus();
    }
  }

  /** @param {boolean} open @param {boolean} [back] whether the focus returns to the button */
  #openMenu(open, back = false) {
    this.#menu.hidden = !open;
    this.#more.setAttribute("aria-expanded", String(open));
    if (open) /** @type {HTMLElement | null} */ (this.#menu.querySelector("button, a"))?.focus();
    else if (back) this.#more.focus();
  }

  #showMenu() {
    const { words } = this.#assistant;
    const isEmpty = this.#assistant.conversation.turns.length === 0;
    const item = (/** @type {any} */ picture, /** @type {string} */ name, /** @type {() => void} */ act) =>
      h("button", { type: "button", click: () => { this.#openMenu(false); act(); } }, icon(picture), name);
    const page = h("a", { href: new URL("chat/", ROOT).href, target: "_blank", rel: "noopener" }, icon("page"), words.page);
    const focus = () => this.#assistant.focus();
    this.#menu.replaceChildren(
      ...(isEmpty
        ? []
        : [
            item("fresh", words.fresh, () => { this.#assistant.startAfresh(); focus(); }),
            item("save", words.save, () => saveConversation(this.#assistant)),
            item("trash", words.clear, () => { this.#assistant.clear(); focus(); }),
          ]),
      page,
    );
  }

  /** @param {Partial<import("../shared/api.js").ChatConfig>} config */
  #showWords(config) {
    const { words, language } = this.#assistant;
    this.#element.lang = language;
    this.#title.textContent = config.title || words.title;
    const close = this.#element.querySelector("#close");
    for (const [button, name] of /** @type {[HTMLElement, string][]} */ ([[this.#more, words.menu], [close, words.close]])) {
      button.setAttribute("aria-label", name);
      button.title = name;
    }
    this.#more.setAttribute("aria-expanded", String(!this.#menu.hidden));
    this.#showMenu();
  }
}
