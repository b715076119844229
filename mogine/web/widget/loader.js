// The bubble on a company's page: one file, nothing more is loaded until it is wanted.
// Written for old browsers too: where the chat cannot run, the bubble is a link to the chat page.

(() => {
  "use strict";
  const setup = /*setup*/ {};
  const script = document.currentScript || document.querySelector('script[src*="widget.js"]');
  if (!script || document.querySelector("mogine-widget")) return;
  const data = script.dataset;
  const root = new URL(".", script.src);
  const look = Object.assign({}, setup, data.position && { position: data.position }, data.theme && { theme: data.theme });
  const languages = [data.language, /^(zh|en)/.test(setup.language || "") ? setup.language : "", document.documentElement.lang]
    .concat(navigator.languages || [navigator.language])
    .filter(Boolean);
  const spoken = languages.find((language) => /^(zh|en)\b/i.test(language)) || "en";
  const title = (look.titles || {})[spoken.slice(0, 2).toLowerCase()] || "";
  const name = /^zh/i.test(spoken) ? "打开对话" : "Open the chat";

  const css = `
:host { all: initial !important; }
.bubble { all: initial; box-sizing: border-box; position: fixed; z-index: 2147483000;
  bottom: calc(20px + env(safe-area-inset-bottom, 0px)); width: 56px; height: 56px; border-radius: 50%;
  display: grid; place-items: center; cursor: pointer; color: var(--on); background: var(--back);
  box-shadow: 0 2px 6px rgb(0 0 0 / 16%), 0 8px 28px rgb(0 0 0 / 22%); transition: transform .15s, opacity .15s; }
.bubble.right { right: calc(20px + env(safe-area-inset-right, 0px)); }
.bubble.left { left: calc(20px + env(safe-area-inset-left, 0px)); }
.bubble:hover { transform: scale(1.05); }
.bubble:focus-visible { outline: 3px solid var(--back); outline-offset: 3px; }
.bubble svg { width: 28px; height: 28px; fill: none; stroke: currentColor; stroke-width: 1.8;
  stroke-linecap: round; stroke-linejoin: round; }
.bubble.busy svg { animation: wait 1s infinite ease-in-out; }
.bubble[hidden] { display: none; }
@keyframes wait { 50% { opacity: .35; } }
@media (prefers-reduced-motion: reduce) { .bubble { transition: none; } .bubble.busy svg { animation: none; opacity: .5; } }
@media print { :host { display: none !important; } }`;

  class MogineWidget extends HTMLElement {
    connectedCallback() {
      if (this.shadowRoot) return;
      const shadow = this.attachShadow({ mode: "open" });
      try {
        // Constructed sheets pass the strictest policy of the page around.
        const sheet = new CSSStyleSheet();
        sheet.replaceSync(css);
        shadow.adoptedStyleSheets = [sheet];
      } catch (_) {
        const style = document.createElement("style");
        style.textContent = css;
        shadow.append(style);
      }
      const colours = (look.colours && look.colours.light) || {};
      const bubble = document.createElement("a");
      bubble.className = `bubble ${look.position === "left" ? "left" : "right"}`;
      bubble.href = new URL("chat/", root).href;
      bubble.setAttribute("role", "button");
      bubble.setAttribute("aria-haspopup", "dialog");
      bubble.setAttribute("aria-expanded", "false");
      bubble.setAttribute("aria-label", title ? `${name}${/^zh/i.test(spoken) ? "：" : ": "}${title}` : name);
      bubble.title = title || name;
      bubble.style.setProperty("--back", colours.accent || "#1852e0");
      bubble.style.setProperty("--on", colours["on-accent"] || "#fff");
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 28 28");
      svg.setAttribute("aria-hidden", "true");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", "M14 4.5c5.8 0 10.3 3.9 10.3 9s-4.5 9-10.3 9c-1.3 0-2.6-.2-3.7-.6L5 24l1-4.4c-1.5-1.6-2.3-3.7-2.3-6.1 0-5.1 4.5-9 10.3-9zM9.7 13.5h.01M14 13.5h.01M18.3 13.5h.01");
      svg.append(path);
      bubble.append(svg);
      shadow.append(bubble);

      let panel = null;
      const load = () => {
        panel = panel || import(new URL(`assets/${setup.build}/widget/panel.js`, root).href);
        return panel;
      };
      const open = (wanted) => {
        bubble.classList.add("busy");
        return load()
          .then((module) => module.start({ host: this, shadow, bubble, look, title, languages, wanted }))
          .then(() => bubble.classList.remove("busy"))
          .catch(() => {
            bubble.classList.remove("busy");
            panel = null;
            if (wanted) location.href = bubble.href;
          });
      };
      const press = (event) => {
        event.preventDefault();
        void open(true);
      };
      bubble.addEventListener("click", (event) => {
        if (!event.ctrlKey && !event.metaKey && !event.shiftKey) press(event);
      });
      bubble.addEventListener("keydown", (event) => event.key === " " && press(event));
      // Ready by the time of the click.
      for (const hint of ["pointerenter", "touchstart", "focus"]) {
        bubble.addEventListener(hint, () => void load().catch(() => (panel = null)), { once: true, passive: true });
      }
      let awake = false;
      try {
        awake = sessionStorage.getItem(`mogine:${root.host}${root.pathname}#awake`) === "1";
      } catch (_) {
        // Storage is forbidden here: every page begins anew.
      }
      if (awake) void open(false);
      /** For the page's own buttons. */
      this.open = () => open(true);
    }
  }

  if (!window.customElements) return;
  if (!customElements.get("mogine-widget")) customElements.define("mogine-widget", MogineWidget);
  const add = () => document.body.append(document.createElement("mogine-widget"));
  if (document.body) add();
  else addEventListener("DOMContentLoaded", add);
})();
