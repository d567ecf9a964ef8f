/** Requests to the service. Paths are relative to the page, so that it works below a mount path, too. */

/** What the service answers where it refuses: a problem (RFC 9457), which may name the field to blame. */
export class Problem extends Error {
  /** @param {number} status 0: the service can't be reached */
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
 * Whoever asks first, it is told where the service knows nobody any more: a token may end while the page is open.
 * @param {(problem: Problem) => void} listener
 */
export function whenUnauthorized(listener) {
  refused = listener
}

/** 128 random bits: what makes two requests one. Not `randomUUID`, which is missing on plain http beyond loopback. */
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")
}

/**
 * The answer, if it is a good one. A request with an idempotency key is sent again once where the line broke.
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
