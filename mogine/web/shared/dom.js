// Elements made in one line, with text nodes alone; and the few icons.

/**
 * @param {string} tag
 * @param {Record<string, string | boolean | null | ((event: any) => void)>} [attributes] a function listens to
 *   the event of its name; true is an empty attribute; false and null are none
 * @param {...(Node | string | null)} children
 * @returns {HTMLElement}
 */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const ICONS = {
  send: "M10 16V5m0 0-5 5m5-5 5 5",
  down: "M10 4v11m0 0 5-5m-5 5-5-5",
  close: "M5 5l10 10M15 5L5 15",
  fresh: "M10 4.5v11M4.5 10h11",
  menu: "M4 10h.01M10 10h.01M16 10h.01",
  copy: "M7 7V4.5h8.5V13H13M4.5 7H13v8.5H4.5z",
  check: "M4.5 10.5l3.5 3.5 7.5-8",
  up: "M6.5 9v7M3.5 9h3v7h-3zM6.5 9l3-5.5c1.4 0 2 .9 1.8 2.1L11 8h4.2c1 0 1.6.9 1.4 1.8l-1.1 4.9c-.2.8-.8 1.3-1.6 1.3H6.5",
  thumbdown: "M13.5 11V4m3 7h-3V4h3zM13.5 11l-3 5.5c-1.4 0-2-.9-1.8-2.1L9 12H4.8c-1 0-1.6-.9-1.4-1.8l1.1-4.9C4.7 4.5 5.3 4 6.1 4h7.4",
  page: "M8 4.5H4.5v11h11V12M11.5 4.5h4v4M15.5 4.5L9 11",
  trash: "M4 6h12M8 6V4h4v2M5.5 6l.8 10h7.4l.8-10",
  save: "M10 3.5V12m0 0l3.5-3.5M10 12L6.5 8.5M4 15.5h12",
  phone: "M6.5 3.5l2 3.7-1.7 1.5c.8 1.9 2.2 3.3 4.2 4.3l1.5-1.8 3.7 1.8v2.6c0 .6-.5 1-1 .9C9 15.9 4.2 11 3.5 5c0-.8.4-1.5 1-1.5z",
  mail: "M3.5 5h13v10h-13zM3.5 5.5L10 11l6.5-5.5",
  list: "M4 5.5h12M4 10h12M4 14.5h12",
};

/** @param {keyof typeof ICONS} name @param {string} [className] */
export function icon(name, className = "icon") {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", className);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button that shows a picture and says a name. @param {keyof typeof ICONS} picture @param {string} name
 * @param {(event: any) => void} click @param {string} [className] @returns {HTMLButtonElement} */
export function iconButton(picture, name, click, className = "tool") {
  const attributes = { type: "button", class: className, "aria-label": name, title: name, click };
  return /** @type {HTMLButtonElement} */ (h("button", attributes, icon(picture)));
}
