// What the dashboard asks of the analytics server. The session is a cookie that no script can read.

/** Where the server's paths begin: the page lies at <root>dashboard/. */
export const ROOT = new URL("../", location.href.split(/[?#]/)[0]);

export class Refused extends Error {
  /** @param {number} status @param {string} reason @param {string} message */
  constructor(status, reason, message) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

/**
 * @param {string} path below /api/analytics/
 * @param {Record<string, string | number | null | undefined>} [query] empty ones are left out
 * @param {RequestInit & {json?: unknown}} [options]
 * @returns {Promise<any>} the JSON of the answer. Throws Refused.
 */
export async function ask(path, query = {}, { json, ...options } = {}) {
  const address = addressOf(path, query);
  const how = { credentials: /** @type {const} */ ("same-origin"), cache: /** @type {const} */ ("no-store"), ...options };
  if (json !== undefined) {
    how.method ??= "POST";
    how.body = JSON.stringify(json);
    how.headers = { ...how.headers, "Content-Type": "application/json" };
  }
  let response;
  try {
    response = await fetch(address, how);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Refused(0, "network", String(error));
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  const told = body?.error ?? {};
  throw new Refused(response.status, String(told.reason ?? "unknown"), String(told.message ?? response.statusText));
}

/** @param {string} path @param {Record<string, string | number | null | undefined>} query */
export function addressOf(path, query) {
  const address = new URL(`api/analytics/${path}`, ROOT);
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") address.searchParams.set(name, String(value));
  }
  return address;
}
