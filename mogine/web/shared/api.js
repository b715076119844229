// What the pages ask of the server; every failure becomes one kind of error.

import { readEvents } from "./stream.js";

const CONFIG_TIMEOUT_MS = 10_000;

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
 * @property {string} title
 * @property {string} greeting
 * @property {string[]} starters
 * @property {string} language
 * @property {string} ai_notice
 * @property {number} max_question_chars
 */

/**
 * @param {URL} root where the server's paths begin
 * @returns {Promise<Partial<ChatConfig>>}
 */
export async function loadConfig(root) {
  const timeout = new AbortController();
  const timer = setTimeout(() => timeout.abort(), CONFIG_TIMEOUT_MS);
  try {
    const response = await fetch(new URL("api/chat/config", root), {
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
 * Ask the assistant. Yields `{event, data}` with the data parsed, and ends after `done`.
 * Throws ApiError; when `signal` stops it, the AbortError of fetch.
 * @param {URL} root
 * @param {{question: string, session_id: string, page_url?: string}} body
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<{event: string, data: any}, void, void>}
 */
export async function* ask(root, body, signal) {
  const response = await reach(new URL("api/chat", root), body, signal);
  if (!response.ok) throw await errorOf(response);
  if (response.body === null) throw new ApiError("cut", "the response has no body");
  try {
    for await (const { event, data } of readEvents(response.body)) {
      const value = parsed(data);
      if (event === "error") throw ofEnvelope(value, response.status, 0);
      yield { event, data: value };
      if (event === "done") return;
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError("cut", String(error));
  }
  throw new ApiError("cut", "the answer ended early");
}

/** @param {URL} address @param {object} body @param {AbortSignal} signal */
async function reach(address, body, signal) {
  try {
    return await fetch(address, {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
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
export function newSessionId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
