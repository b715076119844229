// Markdown as DOM nodes, made with textContent alone: whatever a model writes, nothing of it can run.
//
// A deliberately small dialect: headings, paragraphs, lists, quotes, code, tables, rules, emphasis, links.
// HTML stays text, pictures become links (a picture of another host would tell it about the conversation).

const MAX_DEPTH = 8;
const MAX_LABEL_CHARS = 300;
const MAX_COLUMNS = 50;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(?=\S)|[ \t]*$)/;
const PLAIN = /[^\\`*_~![<h&\n]+/y;
const CITATION = /\[(\d{1,3})\](?!\()/y;
const ANGLE_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const BARE_LINK = /https?:\/\/[^\s<>"'`|\u3000-\u303f\uff00-\uffef\u2018-\u201f\u2026]{1,2000}/iy;
const BREAK_TAG = /<br\s{0,3}\/?>/iy;
const ENTITY = /&(amp|lt|gt|quot|apos|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", "#39": "'" };
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}_]/u;
const DIRECTION_OVERRIDES = /[\u202a-\u202e\u2066-\u2069]/g;

/**
 * @typedef {object} Block
 * @property {string} source the lines it was read from
 * @property {(options: Options) => Node} render
 *
 * @typedef {object} Options
 * @property {boolean} partial the text may go on: an open `**` or backtick at its end counts as closed
 * @property {(number: number) => Node | null} cite the mark for a citation, or null when there is none
 * @property {boolean} [inLink] within a link's label there are no links
 */

/** Shows a text that grows; blocks that have not changed keep their nodes, so nothing flickers. */
export class MarkdownView {
  /** @type {string[]} */
  #keys = [];
  #container;
  #cite;

  /**
   * @param {HTMLElement} container is filled with one child per block
   * @param {(number: number) => Node | null} cite
   */
  constructor(container, cite) {
    this.#container = container;
    this.#cite = cite;
  }

  /** @param {string} text all of it so far @param {boolean} partial whether more may come */
  update(text, partial) {
    const blocks = parseBlocks(text.replace(DIRECTION_OVERRIDES, "").split(/\r\n|\n|\r/), 0);
    const keys = blocks.map(({ source }, at) => `${partial && at === blocks.length - 1 ? "~" : "="}${source}`);
    blocks.forEach((block, at) => {
      if (this.#keys[at] === keys[at]) return;
      const node = block.render({ partial: keys[at].startsWith("~"), cite: this.#cite });
      const old = this.#container.childNodes[at];
      if (old) old.replaceWith(node);
      else this.#container.append(node);
    });
    while (this.#container.childNodes.length > blocks.length) this.#container.lastChild?.remove();
    this.#keys = keys;
  }
}

/**
 * The address as a link may carry it: absolute http, https or mailto; null for anything else.
 * @param {string} address
 * @returns {string | null}
 */
export function safeAddress(address) {
  let url;
  try {
    url = new URL(address.trim());
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol) || url.username || url.password) return null;
  return url.href;
}

/** @param {string} address already safe @returns {HTMLAnchorElement} a link that opens apart and tells nothing */
export function externalLink(address) {
  const link = document.createElement("a");
  link.href = address;
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow ugc";
  return link;
}

// --- blocks ---------------------------------------------------------------------------------------

/** @param {string[]} lines @param {number} depth @returns {Block[]} */
function parseBlocks(lines, depth) {
  /** @type {Block[]} */
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [end, render] = parseBlock(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), render });
    at = end;
  }
  return blocks;
}

/**
 * The block that begins at a line that is not blank: where it ends, and how it looks.
 * @param {string[]} lines @param {number} at @param {number} depth
 * @returns {[number, (options: Options) => Node]}
 */
function parseBlock(lines, at, depth) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return parseFence(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading) {
    const text = withoutClosingHashes(lines[at].slice(heading[0].length).trim());
    // The page's own title is h1; an answer's headings stand below it.
    const tag = `h${Math.min(6, heading[1].length + 2)}`;
    return [at + 1, (options) => element(tag, ...inline(text, options))];
  }
  if (isRule(lines[at])) return [at + 1, () => element("hr")];
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(lines[at])) return parseQuote(lines, at, depth);
    if (ITEM.test(lines[at])) return parseList(lines, at, depth);
  }
  if (isTable(lines, at)) return parseTable(lines, at);
  return parseParagraph(lines, at, depth);
}

/** @param {string[]} lines @param {number} at @param {RegExpExecArray} fence @returns {[number, () => Node]} */
function parseFence(lines, at, fence) {
  const mark = fence[1];
  const indent = lines[at].length - lines[at].trimStart().length;
  const isClosing = (/** @type {string} */ line) => {
    const text = line.trim();
    return text.length >= mark.length && text === mark[0].repeat(text.length);
  };
  let end = at + 1;
  while (end < lines.length && !isClosing(lines[end])) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, indentOf(line))));
  return [
    Math.min(end + 1, lines.length),
    () => {
      const pre = element("pre", element("code", body.join("\n")));
      pre.tabIndex = 0; // so that a keyboard can scroll it
      return pre;
    },
  ];
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[number, (o: Options) => Node]} */
function parseQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = parseBlocks(
    lines.slice(at, end).map((line) => line.replace(QUOTE, "")),
    depth + 1,
  );
  return [end, (options) => element("blockquote", ...renderAll(inner, options))];
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[number, (o: Options) => Node]} */
function parseList(lines, at, depth) {
  const first = /** @type {RegExpExecArray} */ (ITEM.exec(lines[at]));
  const ordered = /\d/.test(first[2]);
  /** @type {string[][]} */
  const items = [];
  let inside = 0;
  let end = at;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (line.trim() === "") {
      const next = nextFilled(lines, end);
      if (next < 0 || !(indentOf(lines[next]) >= inside || isItem(lines[next], ordered))) break;
      items[items.length - 1].push("");
      end = next - 1;
      continue;
    }
    const item = ITEM.exec(line);
    if (item && (items.length === 0 || item[1].length < inside)) {
      if (/\d/.test(item[2]) !== ordered || isRule(line)) break;
      items.push([line.slice(item[0].length)]);
      inside = item[1].length + Math.min(item[2].length + 1, 2);
    } else if (indentOf(line) >= inside) {
      items[items.length - 1].push(line.slice(inside));
    } else if (lines[end - 1].trim() !== "" && !startsBlock(lines, end, depth)) {
      items[items.length - 1].push(line);
    } else {
      break;
    }
  }
  const contents = items.map((item) => parseBlocks(item.map(dedented(item)), depth + 1));
  const start = ordered ? Number.parseInt(first[2], 10) : 1;
  return [
    end,
    (options) => {
      const list = element(ordered ? "ol" : "ul");
      if (ordered && start !== 1) /** @type {HTMLOListElement} */ (list).start = start;
      contents.forEach((blocks, index) => {
        const last = { ...options, partial: options.partial && index === contents.length - 1 };
        list.append(element("li", ...renderAll(blocks, last, true)));
      });
      return list;
    },
  ];
}

/** Lines of an item may be indented by its number's width ("10. "); the rest of it goes by the least one. */
function dedented(/** @type {string[]} */ item) {
  const rest = item.slice(1).filter((line) => line.trim() !== "");
  const extra = rest.reduce((least, line) => Math.min(least, indentOf(line)), 2);
  return (/** @type {string} */ line, /** @type {number} */ index) =>
    index === 0 ? line : line.slice(Math.min(extra, indentOf(line)));
}

/** @param {string[]} lines @param {number} at */
function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !lines[at + 1].includes("-")) return false;
  const rule = cells(lines[at + 1]);
  return rule.length === cells(lines[at]).length && rule.every((cell) => /^:?-+:?$/.test(cell));
}

/** @param {string[]} lines @param {number} at @returns {[number, (options: Options) => Node]} */
function parseTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const sides = cells(lines[at + 1]).map((rule) =>
    rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "end") : "start",
  );
  const head = cells(lines[at]);
  const rows = lines.slice(at + 2, end).map(cells);
  return [end, (options) => table(head, rows, sides, options)];
}

/** @param {string[]} head @param {string[][]} rows @param {string[]} sides @param {Options} options */
function table(head, rows, sides, options) {
  const columns = head.slice(0, MAX_COLUMNS);
  const row = (/** @type {string} */ tag, /** @type {string[]} */ texts) =>
    element(
      "tr",
      ...columns.map((_, column) => {
        const cell = element(tag, ...inline(texts[column] ?? "", options));
        cell.className = `to-${sides[column] ?? "start"}`;
        if (tag === "th") cell.setAttribute("scope", "col");
        return cell;
      }),
    );
  const body = element("tbody", ...rows.map((texts) => row("td", texts)));
  const scroller = element("div", element("table", element("thead", row("th", head)), body));
  scroller.className = "table";
  scroller.tabIndex = 0; // so that a keyboard can scroll it
  return scroller;
}

/** @param {string} line @returns {string[]} */
function cells(line) {
  const text = line.trim().replace(/^\|/, "");
  /** @type {string[]} */
  const found = [];
  let cell = "";
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\" && text[at + 1] === "|") {
      cell += "|";
      at += 1;
    } else if (text[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += text[at];
    }
  }
  if (cell.trim() !== "" || found.length === 0) found.push(cell.trim());
  return found;
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[number, (o: Options) => Node]} */
function parseParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines, end, depth)) end += 1;
  const text = lines
    .slice(at, end)
    .map((line) => line.trim())
    .join("\n");
  return [
    end,
    (options) =>
      // The first line of a table whose rule is still coming: a row already, no bars that jump away.
      options.partial && text.startsWith("|") && /^\|[^\n]*(\n[|:\- \t]*)?$/.test(text)
        ? table(cells(text.split("\n", 1)[0]), [], [], options)
        : element("p", ...inline(text, options)),
  ];
}

/** @param {string[]} lines @param {number} at @param {number} depth whether a paragraph ends before this line */
function startsBlock(lines, at, depth) {
  const line = lines[at];
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    isRule(line) ||
    (depth < MAX_DEPTH && (QUOTE.test(line) || ITEM.test(line))) ||
    isTable(lines, at)
  );
}

/** @param {string} line */
function isRule(line) {
  const marks = line.replace(/[ \t]/g, "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

/** @param {string} line @param {boolean} ordered */
function isItem(line, ordered) {
  const item = ITEM.exec(line);
  return item !== null && /\d/.test(item[2]) === ordered && !isRule(line);
}

/** @param {string} line */
function indentOf(line) {
  return line.length - line.trimStart().length;
}

/** @param {string[]} lines @param {number} at the next line that is not blank, or -1 */
function nextFilled(lines, at) {
  for (let next = at + 1; next < lines.length; next += 1) if (lines[next].trim() !== "") return next;
  return -1;
}

/** @param {string} text */
function withoutClosingHashes(text) {
  let end = text.length;
  while (end > 0 && text[end - 1] === "#") end -= 1;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trimEnd() : text;
}

/**
 * @param {Block[]} blocks @param {Options} options
 * @param {boolean} [tight] paragraphs lose their own box, as within the items of a list
 * @returns {Node[]}
 */
function renderAll(blocks, options, tight = false) {
  return blocks.flatMap((block, at) => {
    const node = block.render({ ...options, partial: options.partial && at === blocks.length - 1 });
    return tight && node.nodeName === "P" && at === 0 ? [...node.childNodes] : [node];
  });
}

// --- inline ---------------------------------------------------------------------------------------

/** @param {string} text @param {Options} options @param {number} [depth] @returns {Node[]} */
function inline(text, options, depth = 0) {
  return new InlineParser(text, options, depth).parse();
}

class InlineParser {
  #at = 0;
  #plain = "";
  /** @type {Node[]} */
  #nodes = [];
  /** Marks for which there is no closing one further on: looked for once, not at every opening one. */
  #hopeless = new Set();
  #text;
  #options;
  #depth;

  /** @param {string} text @param {Options} options @param {number} depth */
  constructor(text, options, depth) {
    this.#text = text;
    this.#options = options;
    this.#depth = depth;
  }

  /** @returns {Node[]} */
  parse() {
    while (this.#at < this.#text.length) {
      const run = this.#match(PLAIN);
      if (run) this.#plain += run[0];
      else if (!this.#special(this.#text[this.#at])) {
        this.#plain += this.#text[this.#at];
        this.#at += 1;
      }
    }
    this.#flush();
    return this.#nodes;
  }

  /** @param {string} character @returns {boolean} whether something was taken */
  #special(character) {
    switch (character) {
      case "\n":
        this.#at += 1;
        return this.#add(element("br"));
      case "\\":
        return this.#escape();
      case "`":
        return this.#code();
      case "*":
      case "_":
        return this.#emphasis(character.repeat(2), "strong") || this.#emphasis(character, "em");
      case "~":
        return this.#emphasis("~~", "s");
      case "!":
        return this.#text[this.#at + 1] === "[" && this.#link(this.#at + 1);
      case "[":
        return this.#citation() || this.#link(this.#at);
      case "<":
        return this.#angle();
      case "h":
      case "H":
        return this.#bareLink();
      case "&": {
        const entity = this.#match(ENTITY);
        if (entity) this.#plain += ENTITIES[/** @type {keyof typeof ENTITIES} */ (entity[1])];
        return entity !== null;
      }
      default:
        return false;
    }
  }

  /** @param {RegExp} sticky */
  #match(sticky) {
    sticky.lastIndex = this.#at;
    const match = sticky.exec(this.#text);
    if (match) this.#at += match[0].length;
    return match;
  }

  #flush() {
    if (this.#plain !== "") this.#nodes.push(document.createTextNode(this.#plain));
    this.#plain = "";
  }

  /** @param {Node} node @returns {true} */
  #add(node) {
    this.#flush();
    this.#nodes.push(node);
    return true;
  }

  #escape() {
    const next = this.#text[this.#at + 1] ?? "";
    if (!PUNCTUATION.test(next)) return false;
    this.#plain += next;
    this.#at += 2;
    return true;
  }

  #code() {
    let length = 1;
    while (this.#text[this.#at + length] === "`") length += 1;
    const mark = "`".repeat(length);
    const from = this.#at + length;
    const end = this.#find(mark, from, (at) => this.#text[at + length] !== "`" && this.#text[at - 1] !== "`");
    if (end < 0 && !this.#options.partial) {
      this.#plain += mark;
      this.#at = from;
      return true;
    }
    const code = this.#text.slice(from, end < 0 ? undefined : end).replaceAll("\n", " ");
    this.#at = end < 0 ? this.#text.length : end + length;
    const padded = code.length > 2 && code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
    return code === "" || this.#add(element("code", padded ? code.slice(1, -1) : code));
  }

  /** @param {string} mark @param {string} tag */
  #emphasis(mark, tag) {
    const from = this.#at + mark.length;
    if (!this.#text.startsWith(mark, this.#at) || this.#depth >= MAX_DEPTH) return false;
    const inWords = mark[0] === "_";
    if (inWords && WORD.test(this.#text[this.#at - 1] ?? "")) return false;
    const open = from >= this.#text.length;
    if (open ? !this.#options.partial || mark.length < 2 : /\s/.test(this.#text[from])) return false;
    const end = this.#find(mark, from + 1, (at) => {
      if (/\s/.test(this.#text[at - 1])) return false;
      const after = this.#text[at + mark.length] ?? "";
      // "***both***": the outer pair closes last, and a single mark never within a double one.
      if (mark.length === 2 ? after === mark[0] : after === mark || this.#text[at - 1] === mark) return false;
      return !inWords || !WORD.test(after);
    });
    // A single star may well be a multiplication sign; a double one at the end of a text that grows is not.
    if (end < 0 && (!this.#options.partial || mark.length < 2)) return false;
    const content = this.#text.slice(from, end < 0 ? undefined : end);
    this.#at = end < 0 ? this.#text.length : end + mark.length;
    return content === "" || this.#add(element(tag, ...inline(content, this.#options, this.#depth + 1)));
  }

  /** @param {string} mark @param {number} from @param {(at: number) => boolean} closes */
  #find(mark, from, closes) {
    if (this.#hopeless.has(mark)) return -1;
    for (let at = this.#text.indexOf(mark, from); at >= 0; at = this.#text.indexOf(mark, at + 1)) {
      if (closes(at)) return at;
    }
    this.#hopeless.add(mark);
    return -1;
  }

  #citation() {
    const start = this.#at;
    const match = this.#match(CITATION);
    const node = match && this.#options.cite(Number(match[1]));
    if (node) return this.#add(node);
    this.#at = start;
    return false;
  }

  /** @param {number} bracket where the label's `[` stands */
  #link(bracket) {
    const label = this.#options.inLink || this.#depth >= MAX_DEPTH ? null : this.#label(bracket);
    if (label === null) return false;
    const after = bracket + label.length + 2;
    if (this.#text[after] !== "(") return false;
    const target = this.#target(after + 1);
    if (target === null) {
      // The address is still coming: show its label until it is whole.
      if (!this.#options.partial || this.#text.indexOf(")", after) >= 0) return false;
      this.#at = this.#text.length;
      return this.#addAll(inline(label, this.#options, this.#depth + 1));
    }
    this.#at = target.end;
    const address = safeAddress(target.address);
    const inside = { ...this.#options, inLink: true, cite: () => null };
    const content = inline(label || target.address, inside, this.#depth + 1);
    if (address === null) return this.#addAll(content);
    const link = externalLink(address);
    link.append(...content);
    return this.#add(link);
  }

  /** @param {Node[]} nodes @returns {true} */
  #addAll(nodes) {
    for (const node of nodes) this.#add(node);
    return true;
  }

  /** @param {number} bracket @returns {string | null} */
  #label(bracket) {
    let depth = 0;
    const limit = Math.min(this.#text.length, bracket + MAX_LABEL_CHARS);
    for (let at = bracket; at < limit; at += 1) {
      if (this.#text[at] === "\\") at += 1;
      else if (this.#text[at] === "[") depth += 1;
      else if (this.#text[at] === "]" && (depth -= 1) === 0) return this.#text.slice(bracket + 1, at);
    }
    return null;
  }

  /** @param {number} from @returns {{address: string, end: number} | null} */
  #target(from) {
    let depth = 1;
    const limit = Math.min(this.#text.length, from + 2000);
    for (let at = from; at < limit && this.#text[at] !== "\n"; at += 1) {
      if (this.#text[at] === "(") depth += 1;
      else if (this.#text[at] === ")" && (depth -= 1) === 0) {
        const [address = ""] = this.#text.slice(from, at).trim().split(/\s/, 1);
        return { address: address.replace(/^<|>$/g, ""), end: at + 1 };
      }
    }
    return null;
  }

  #angle() {
    if (this.#match(BREAK_TAG)) return this.#add(element("br"));
    const start = this.#at;
    const match = this.#match(ANGLE_LINK);
    const address = match && safeAddress(match[1]);
    if (match && address && !this.#options.inLink) {
      const link = externalLink(address);
      link.textContent = match[1];
      return this.#add(link);
    }
    this.#at = start;
    return false;
  }

  #bareLink() {
    if (this.#options.inLink || /[A-Za-z0-9_]/.test(this.#text[this.#at - 1] ?? "")) return false;
    const start = this.#at;
    const match = this.#match(BARE_LINK);
    if (!match) return false;
    const shown = trimmedAddress(match[0]);
    const address = safeAddress(shown);
    this.#at = address ? start + shown.length : start;
    if (!address) return false;
    const link = externalLink(address);
    link.textContent = shown;
    return this.#add(link);
  }
}

/** @param {string} address a bare one, without the punctuation of the sentence around it */
function trimmedAddress(address) {
  let end = address.length;
  while (end > 0 && ".,;:!?*_~)]}".includes(address[end - 1])) {
    if (address[end - 1] === ")" && address.slice(0, end).split("(").length === address.slice(0, end).split(")").length) {
      break;
    }
    end -= 1;
  }
  return address.slice(0, end);
}

/** @param {string} tag @param {...(Node | string)} children @returns {HTMLElement} */
function element(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}
