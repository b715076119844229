// Server-sent events out of a response: bytes in any split, whole events out.

const MAX_LINE_CHARS = 1024 * 1024;

/**
 * @typedef {object} ServerEvent
 * @property {string} event the event's name; "message" where the server gave none
 * @property {string} data its data lines, joined by line feeds
 * @property {string} id the last id that the server gave, with this event or before
 */

/** An incremental parser; feed it bytes, or text, as they come. */
export class EventStreamParser {
  #decoder = new TextDecoder("utf-8");
  #line = "";
  #afterCarriageReturn = false;
  #event = "";
  #id = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {Uint8Array} bytes the next piece, cut anywhere, also within a character
   * @returns {ServerEvent[]} the events that this piece completed
   */
  push(bytes) {
    return this.pushText(this.#decoder.decode(bytes, { stream: true }));
  }

  /** @param {string} text @returns {ServerEvent[]} */
  pushText(text) {
    /** @type {ServerEvent[]} */
    const events = [];
    let start = 0;
    if (this.#afterCarriageReturn && text.length > 0) {
      // CRLF cut between two pieces: the line ended with the CR already.
      if (text[0] === "\n") start = 1;
      this.#afterCarriageReturn = false;
    }
    for (let at = start; at < text.length; at += 1) {
      const character = text[at];
      if (character !== "\n" && character !== "\r") continue;
      this.#endLine(this.#line + text.slice(start, at), events);
      this.#line = "";
      if (character === "\r") {
        if (at + 1 === text.length) this.#afterCarriageReturn = true;
        else if (text[at + 1] === "\n") at += 1;
      }
      start = at + 1;
    }
    this.#line += text.slice(start);
    if (this.#line.length > MAX_LINE_CHARS) throw new Error("a line of the stream is too long");
    return events;
  }

  /** @param {string} line @param {ServerEvent[]} events */
  #endLine(line, events) {
    if (line === "") {
      if (this.#data.length > 0) {
        events.push({ event: this.#event || "message", data: this.#data.join("\n"), id: this.#id });
      }
      this.#event = "";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment: the server's sign of life
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "event") this.#event = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) this.#id = value;
  }
}

/**
 * The events of a response as they come. Leaving the loop early cancels the response.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<ServerEvent, void, void>}
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const parser = new EventStreamParser();
  let ended = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        ended = true;
        return;
      }
      yield* parser.push(value);
    }
  } finally {
    if (!ended) await reader.cancel().catch(() => undefined); // already broken: nothing left to cancel
  }
}
