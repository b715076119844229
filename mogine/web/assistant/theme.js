// The company's colours on the pages.

/**
 * @param {HTMLElement} element with the class "mogine"
 * @param {{colours?: Record<string, Record<string, string>>, theme?: string}} config
 */
export function dress(element, { colours = {}, theme = "auto" }) {
  if (theme === "light" || theme === "dark") element.dataset.theme = theme;
  for (const [name, colour] of Object.entries(colours)) {
    for (const [role, value] of Object.entries(colour)) {
      if (/^#[0-9a-f]{6}$/.test(value)) element.style.setProperty(`--${name}-${role}`, value);
    }
  }
}
