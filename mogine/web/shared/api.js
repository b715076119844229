// What the pages ask of the server; every failure becomes one kind of error.

import { EventStreamParser, readEvents } from "./stream.js";

const CONFIG_TIMEOUT_MS = 10_000;
// Together a little less than the time for which the server keeps an answer that nobody reads.
const AGAIN_AFTER_MS = [200, 800, 2000, 4000, 6000];

/** Where the server's paths begin: this file lies at <root>assets/BUILD/shared/api.js. */
export const ROOT = new URL("../../../", import.meta.url);

/** A failure in the words of the server's error envelope, or of the network. */
export class ApiError extends Error {
  /**
   * @param {string} reason the envelope's stable word; "network" or "cut" where there was none
   * @param {string} message
   * @param {{status?: number, requestId?: string, retryAfterS?: number}} [details]
   */
  constructor(reason, message, details = {}) {
    super(message);
    this.name = "ApiError";
    this.reason = reason;
    this.status = details.status ?? 0;
    this.requestId = details.requestId ?? "";
    this.retryAfterS = details.retryAfterS ?? 0;
  }
}

/**
 * @typedef {object} ChatConfig
 * @property {string} name
 * @property {string} title
 * @property {string} greeting
 * @property {string[]} starters
 * @property {string} language
 * @property {string} ai_notice
 * @property {{text: string, url: string}} privacy
 * @property {{text: string, contacts: string[], picture: string}} handoff
 * @property {Record<string, Record<string, string>>} colours
 * @property {string} theme
 * @property {number} max_question_chars
 *
 * @typedef {object} Place where an answer stands, by which it can be read on
 * @property {string} requestId
 * @property {string} sessionId
 * @property {string} last the id of the last event that was read
 *
 * @typedef {{event: string, data: any, id: string}} AnswerEvent
 */

/** @param {string} language of the texts, where the site does not fix one @param {URL} [root]
 * @returns {Promise<Partial<ChatConfig>>} */
export async function loadConfig(language, root = ROOT) {
  const timeout = new AbortController();
  const timer = setTimeout(() => timeout.abort(), CONFIG_TIMEOUT_MS);
  try {
    const response = await fetch(new URL(`api/chat/config?lang=${language}`, root), {
      headers: { Accept: "application/json" },
      credentials: "same-origin",
      signal: timeout.signal,
    });
    if (!response.ok) throw await errorOf(response);
    const config = await response.json();
    return config !== null && typeof config === "object" ? config : {};
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Ask the assistant. Yields the answer's events with their data parsed, and ends after `done`; a connection
 * that breaks is taken up again. Throws ApiError; when `signal` stops it, the AbortError of fetch.
 * @param {{question: string, session_id: string, page_url?: string}} body
 * @param {AbortSignal} signal
 * @param {URL} [root]
 * @returns {AsyncGenerator<AnswerEvent, void, void>}
 */
export function ask(body, signal, root = ROOT) {
  const place = { requestId: "", sessionId: body.session_id, last: "" };
  const first = () => open(new URL("api/chat", root), { ...body, resume: true }, {}, signal);
  return read(place, first, signal, root);
}

/**
 * Read on where another page, or a broken connection, left off.
 * @param {Place} place @param {AbortSignal} signal @param {URL} [root]
 * @returns {AsyncGenerator<AnswerEvent, void, void>}
 */
export function resume(place, signal, root = ROOT) {
  const at = { ...place };
  return read(at, () => again(at, signal, root), signal, root);
}

/** End a running answer on the server now. @param {Place} place @param {URL} [root] */
export function stop(place, root = ROOT) {
  const body = JSON.stringify({ request_id: place.requestId, session_id: place.sessionId });
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body, keepalive: true };
  // Without it the answer ends a little later by itself.
  void fetch(new URL("api/chat/stop", root), { ...options, credentials: "same-origin" }).catch(() => undefined);
}

/**
 * @param {{request_id: string, rating?: "up" | "down", reason?: string, comment?: string, session_id: string,
 *   handoff?: boolean}} thumb what the visitor thinks of an answer, or that a person is wanted
 * @param {URL} [root]
 */
export async function rate(thumb, root = ROOT) {
  const response = await reach(new URL("api/feedback", root), thumb, { Accept: "application/json" });
  if (!response.ok) throw await errorOf(response);
}

/**
 * @param {Place} place @param {() => AsyncGenerator<import("./stream.js").ServerEvent>} first
 * @param {AbortSignal} signal @param {URL} root
 */
async function* read(place, first, signal, root) {
  let connect = first;
  for (let tries = 0; ; tries += 1) {
    try {
      for await (const { event, data, id } of connect()) {
        const value = parsed(data);
        if (event === "error") throw ofEnvelope(value, 200, 0);
        if (event === "start") {
          place.requestId = String(value?.request_id ?? "");
          place.sessionId = String(value?.session_id ?? "");
        }
        place.last = id;
        tries = 0;
        yield { event, data: value, id };
        if (event === "done") return;
      }
      throw new ApiError("cut", "the answer ended early");
    } catch (error) {
      if (signal.aborted) throw error;
      const told = error instanceof ApiError ? error : new ApiError("cut", String(error));
      const lost = told.reason === "cut" || told.reason === "network";
      if (place.requestId !== "" && told.status === 404) throw new ApiError("cut", "the answer is gone");
      if (!lost || place.requestId === "" || place.last === "") throw told;
      if (tries >= AGAIN_AFTER_MS.length) throw new ApiError("cut", told.message);
      await pause(AGAIN_AFTER_MS[tries], signal);
      connect = () => again(place, signal, root);
    }
  }
}

/** @param {Place} place @param {AbortSignal} signal @param {URL} root */
function again(place, signal, root) {
  const body = { request_id: place.requestId, session_id: place.sessionId };
  return open(new URL("api/chat/resume", root), body, { "Last-Event-ID": place.last || "0" }, signal);
}

/** @param {number} ms @param {AbortSignal} signal */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    const now = () => {
      clearTimeout(timer);
      resolve(undefined);
    };
    signal.addEventListener("abort", now, { once: true });
    addEventListener("online", now, { once: true });
  });
}

/** @param {URL} address @param {object} body @param {Record<string, string>} headers @param {AbortSignal} signal */
async function* open(address, body, headers, signal) {
  const all = { Accept: "text/event-stream", ...headers };
  if (typeof Response === "undefined" || !("body" in Response.prototype)) {
    yield* openSlowly(address, body, all, signal);
    return;
  }
  const response = await reach(address, body, all, signal);
  if (!response.ok) throw await errorOf(response);
  if (response.body === null) throw new ApiError("cut", "the response has no body");
  yield* readEvents(response.body);
}

/** The same for browsers whose `fetch` tells a response only when it is whole.
 * @param {URL} address @param {object} body @param {Record<string, string>} headers @param {AbortSignal} signal
 * @returns {AsyncGenerator<import("./stream.js").ServerEvent, void, void>} */
async function* openSlowly(address, body, headers, signal) {
  const request = new XMLHttpRequest();
  const parser = new EventStreamParser();
  /** @type {import("./stream.js").ServerEvent[]} */
  const events = [];
  let taken = 0;
  let wake = () => {};
  const changed = () => wake();
  const abort = () => request.abort();
  request.open("POST", address.href);
  request.setRequestHeader("Content-Type", "application/json");
  for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
  for (const kind of ["progress", "load", "error", "abort"]) request.addEventListener(kind, changed);
  signal.addEventListener("abort", abort, { once: true });
  request.send(JSON.stringify(body));
  try {
    for (;;) {
      const ended = request.readyState === 4;
      if (request.status === 200) {
        const text = request.responseText;
        events.push(...parser.pushText(text.slice(taken)));
        taken = text.length;
        yield* events.splice(0);
      } else if (ended && request.status > 0) {
        const wait = Number.parseInt(request.getResponseHeader("Retry-After") ?? "", 10);
        throw ofEnvelope(parsed(request.responseText), request.status, wait > 0 ? wait : 0);
      }
      if (signal.aborted) throw new DOMException("stopped", "AbortError");
      if (ended && request.status === 0) throw new ApiError(taken > 0 ? "cut" : "network", "no connection");
      if (ended) return;
      await new Promise((resolve) => {
        wake = () => resolve(undefined);
        if (request.readyState === 4 || (request.status === 200 && request.responseText.length > taken)) wake();
      });
    }
  } finally {
    signal.removeEventListener("abort", abort);
    if (request.readyState !== 4) request.abort();
  }
}

/** @param {URL} address @param {object} body @param {Record<string, string>} headers @param {AbortSignal} [signal] */
async function reach(address, body, headers, signal) {
  try {
    return await fetch(address, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers },
      body: JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("network", String(error));
  }
}

/** @param {Response} response */
async function errorOf(response) {
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return ofEnvelope(parsed(await response.text().catch(() => "")), response.status, wait > 0 ? wait : 0);
}

/** @param {any} value @param {number} status @param {number} retryAfterS */
function ofEnvelope(value, status, retryAfterS) {
  const error = value?.error ?? {};
  return new ApiError(String(error.reason ?? "unknown"), String(error.message ?? ""), {
    status: Number(error.code ?? status),
    requestId: String(error.request_id ?? ""),
    retryAfterS,
  });
}

/** @param {string} text @returns {any} JSON, or null for what is none (a page of some proxy in between) */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** A new conversation's id: 128 random bits. `crypto.randomUUID` is missing on pages without TLS. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
