/** Requests to the service. Paths are relative to the page, so that a mount path works too. */

/** An error response of the service, a problem (RFC 9457) that may name a field. */
export class Problem extends Error {
  /** @param {number} status 0 if the service can't be reached */
  constructor(status, detail, field = null) {
    super(detail)
    this.status = status
    this.field = field
  }

  /** @param {Response} response */
  static async of(response) {
    const said = await response.json().catch(() => ({}))
    const problem = new Problem(response.status, said.detail || `the service answered ${response.status}`, said.field ?? null)
    if (response.status === 401) refused(problem)
    return problem
  }
}

let refused = () => {}

/**
 * Calls the listener at each 401: a token may expire while the page is open.
 * @param {(problem: Problem) => void} listener
 */
export function whenUnauthorized(listener) {
  refused = listener
}

/** An idempotency key of 128 random bits. `randomUUID` is missing on plain http beyond loopback. */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")
}

/**
 * A successful response. A request with an idempotency key is retried once if the connection broke.
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>} rejected with a `Problem`
 */
export async function call(path, options = {}) {
  const attempts = options.headers?.["Idempotency-Key"] ? 2 : 1
  for (let attempt = 1; ; attempt++) {
    try {
      const response = await fetch(path, { cache: "no-store", ...options })
      if (response.ok) return response
      throw await Problem.of(response)
    } catch (error) {
      if (error instanceof Problem) throw error
      if (attempt === attempts) throw new Problem(0, "the service can't be reached")
    }
  }
}
