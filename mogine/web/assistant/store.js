// The visitor's own conversations, kept in this browser alone, for a week.

const MAX_CONVERSATIONS = 30;
const MAX_TURNS = 60;
const MAX_AGE_MS = 7 * 24 * 3600_000;
const GO_ON_MS = 3600_000; // as long as the server remembers what was said

/**
 * @typedef {object} Turn
 * @property {string} id
 * @property {number} at when it was asked, in ms since 1970
 * @property {string} question
 * @property {string} answer
 * @property {string} reasoning
 * @property {import("./answer.js").Citation[]} citations
 * @property {"running" | "done" | "stopped" | "failed"} state
 * @property {string} ending the finish reason of an answer that is done
 * @property {string} answered "yes", "no" or "unknown"
 * @property {string} requestId
 * @property {string} last the last event's id while it runs
 * @property {"" | "up" | "down"} rating
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} session the server's id for it
 * @property {number} at when it was last written to
 * @property {Turn[]} turns
 */

export class Store {
  #prefix;
  /** @type {Map<string, string>} what is kept where the browser keeps nothing */
  #memory = new Map();

  /** @param {URL} root of the server: several assistants on one host do not mix */
  constructor(root) {
    this.#prefix = `mogine:${root.host}${root.pathname}`;
  }

  /** @returns {Conversation[]} newest first */
  list() {
    const found = this.#keys().map((key) => this.#read(key));
    const fresh = found.filter((c) => c !== null && Date.now() - c.at < MAX_AGE_MS);
    return /** @type {Conversation[]} */ (fresh).sort((a, b) => b.at - a.at);
  }

  /** @param {string} id @returns {Conversation | null} */
  load(id) {
    return this.#read(this.#key(id));
  }

  /** The one to go on with: this tab's own, else the latest when it is young. @returns {Conversation | null} */
  current() {
    const here = this.#session("current");
    if (here === "none") return null;
    if (here) return this.load(here);
    const [latest] = this.list();
    return latest && Date.now() - latest.at < GO_ON_MS ? latest : null;
  }

  /** @param {string | null} id */
  setCurrent(id) {
    this.#setSession("current", id ?? "none");
  }

  /** @param {Conversation} conversation what other tabs have added to it stays */
  save(conversation) {
    const others = this.load(conversation.id)?.turns ?? [];
    const own = new Set(conversation.turns.map((turn) => turn.id));
    const turns = [...conversation.turns, ...others.filter((turn) => !own.has(turn.id))];
    turns.sort((a, b) => a.at - b.at);
    const kept = { ...conversation, at: Date.now(), turns: turns.slice(-MAX_TURNS) };
    this.#write(this.#key(conversation.id), JSON.stringify(kept));
    this.setCurrent(conversation.id);
  }

  /** @param {string} id */
  remove(id) {
    this.#memory.delete(this.#key(id));
    try {
      localStorage.removeItem(this.#key(id));
    } catch {
      // Storage is forbidden here, so there is nothing to remove.
    }
    if (this.#session("current") === id) this.setCurrent(null);
  }

  /** Whether the panel was open on the page before, or an answer was running there. */
  get awake() {
    return this.#session("awake") === "1";
  }

  set awake(value) {
    this.#setSession("awake", value ? "1" : "");
  }

  /** Forget what is too old or too much. */
  tidy() {
    const kept = new Set(this.list().slice(0, MAX_CONVERSATIONS).map(({ id }) => this.#key(id)));
    for (const key of this.#keys()) {
      if (!kept.has(key)) this.remove(key.slice(this.#key("").length));
    }
  }

  /** @param {string} id */
  #key(id) {
    return `${this.#prefix}:${id}`;
  }

  #keys() {
    let stored = /** @type {string[]} */ ([]);
    try {
      stored = Object.keys(localStorage);
    } catch {
      // Storage is forbidden here: the conversations of this page are in memory.
    }
    const start = this.#key("");
    return [...new Set([...stored, ...this.#memory.keys()])].filter((key) => key.startsWith(start));
  }

  /** @param {string} key @returns {Conversation | null} */
  #read(key) {
    try {
      const value = JSON.parse(this.#memory.get(key) ?? localStorage.getItem(key) ?? "null");
      return value && typeof value.id === "string" && Array.isArray(value.turns) ? value : null;
    } catch {
      return null; // forbidden, or damaged by somebody else
    }
  }

  /** @param {string} key @param {string} text */
  #write(key, text) {
    for (let room = 0; room < MAX_CONVERSATIONS; room += 1) {
      try {
        localStorage.setItem(key, text);
        this.#memory.delete(key);
        return;
      } catch {
        const oldest = this.list().filter(({ id }) => this.#key(id) !== key).pop();
        if (!oldest) break;
        this.remove(oldest.id);
      }
    }
    this.#memory.set(key, text);
  }

  /** @param {string} name */
  #session(name) {
    try {
      return sessionStorage.getItem(`${this.#prefix}#${name}`) ?? "";
    } catch {
      return this.#memory.get(`#${name}`) ?? "";
    }
  }

  /** @param {string} name @param {string} value */
  #setSession(name, value) {
    try {
      sessionStorage.setItem(`${this.#prefix}#${name}`, value);
    } catch {
      this.#memory.set(`#${name}`, value);
    }
  }
}
