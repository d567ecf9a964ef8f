// A `fetch` whose event streams resume after a cut: `resumingFetch(url, init)` in place of `fetch`, for GET and POST.
//
// Chat libraries read the body of one `fetch`, and fail when its connection breaks. This gives them one continuous body,
// made of as many connections as needed. Pass it to any library that takes a `fetch`:
//
//     new DefaultChatTransport({ api: "/ai/chat", fetch: resumingFetch })
//
// 1. After a cut it sends a GET with `Last-Event-ID` to the answer's `Content-Location`, or (GET) to the same URL. The
//    stream ends with the status 204, the data `[DONE]` or the event id `end`.
// 2. Only whole events are passed on, so the library never sees the half event before a cut.
// 3. The request itself is sent once: if it fails before the answer begins, so does `resumingFetch`.
// 4. Answers that are not event streams are passed on unchanged. A `Content-Location` of another origin is not followed:
//    the request's headers may hold credentials.

const FIRST_WAIT_MS = 1000 // the default; the server changes it by `retry:`
const LEAST_WAIT_MS = 50 // after a failed try, even with `retry: 0`
const LONGEST_WAIT_MS = 30_000
const AGAIN = new Set([408, 425, 429, 500, 502, 503, 504])
// Without `accept` the server answers 410 for a run that is gone, rather than with an event in another dialect.
const OF_THE_POST = ["accept", "content-type", "content-length", "content-encoding", "idempotency-key", "prefer"]

/** `fetch`, made to resume; by default the platform's own. */
export const makeResumingFetch = (fetch = globalThis.fetch) => async (input, init = {}) => {
  const asked = input instanceof Request ? input : undefined
  const body = new Body(init.signal ?? asked?.signal)
  const response = await fetch(input, { ...init, signal: body.signal })
  const address = new URL(response.url || asked?.url || input, globalThis.location?.href)
  const location = response.headers.get("content-location")
  const again = new URL(location ?? address, address)
  const method = (init.method ?? asked?.method ?? "GET").toUpperCase()
  const resumable = (method === "GET" || location !== null) && again.origin === address.origin
  if (response.status !== 200 || !isEventStream(response) || !response.body || !resumable) return response

  const headers = new Headers(init.headers ?? asked?.headers)
  OF_THE_POST.forEach((name) => location !== null && headers.delete(name))
  const { body: _, method: __, ...rest } = init
  const kept = asked ? { credentials: asked.credentials, mode: asked.mode } : {}
  const reconnect = () => {
    if (body.lastEventId) headers.set("last-event-id", body.lastEventId)
    return fetch(again, { ...kept, ...rest, headers, signal: body.signal })
  }
  const stream = body.of(response, reconnect, location !== null)
  const whole = new Response(stream, { statusText: response.statusText, headers: response.headers })
  return Object.defineProperty(whole, "url", { value: response.url })
}

/** The platform's `fetch`, made to resume. */
export const resumingFetch = (input, init) => makeResumingFetch()(input, init)
export default resumingFetch

/** An `EventSource` over any event stream's body, a POST's too. The platform's own where it has one (2026). */
export const eventSource = (body) =>
  globalThis.EventSource?.fromReadableStream?.(body) ?? new BodyEventSource(body)

const isEventStream = (response) => /^text\/event-stream\b/i.test(response.headers.get("content-type") ?? "")

class Body {
  lastEventId = ""
  #done = false // the stream has sent its last event
  #waitMs = FIRST_WAIT_MS
  #failed = 0
  #rest = ""
  #controller = new AbortController()

  constructor(signal) {
    if (signal?.aborted) this.#controller.abort(signal.reason)
    signal?.addEventListener("abort", () => this.#controller.abort(signal.reason), { once: true })
  }

  get signal() {
    return this.#controller.signal
  }

  /** One stream of the first answer and all later ones. `fromTheStart`: it can be read again without an event id. */
  of(response, reconnect, fromTheStart) {
    const events = this.#read(response, reconnect, fromTheStart)
    const encoder = new TextEncoder()
    return new ReadableStream({
      pull: async (controller) => {
        const { done, value } = await events.next()
        if (done) controller.close()
        else controller.enqueue(encoder.encode(value))
      },
      cancel: (reason) => this.#controller.abort(reason),
    })
  }

  async *#read(response, reconnect, fromTheStart) {
    for (;;) {
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
      this.#rest = ""
      try {
        for (;;) {
          const { done, value } = await reader.read()
          const known = this.lastEventId
          // At the end a CR that was held back is a line end; with an LF behind it, it is the same one.
          const whole = done ? this.#rest.endsWith("\r") && this.#whole("\n") : this.#whole(value)
          if (this.lastEventId !== known) this.#failed = 0
          if (whole) yield whole
          if (done) break
        }
      } catch (error) {
        if (this.signal.aborted) throw error // else a cut
        if (!fromTheStart && !this.lastEventId) throw error
      }
      if (this.#done || (!fromTheStart && !this.lastEventId)) return
      do {
        await this.#pause()
        response = await reconnect().catch((error) => {
          if (this.signal.aborted) throw error
        })
        if (response && AGAIN.has(response.status)) {
          this.#waitMs = Math.max(this.#waitMs, 1000 * (Number(response.headers.get("retry-after")) || 0))
          response = await response.body?.cancel()
        }
      } while (!response)
      if (response.status === 204) return
      if (response.status !== 200 || !isEventStream(response)) {
        const { detail } = await response.json().catch(() => ({})) // a problem document
        throw new TypeError(`can't resume the stream: ${response.status}, ${detail ?? response.statusText}`)
      }
    }
  }

  /** Returns the complete events, and the comments after them; keeps the rest for the next call. */
  #whole(text) {
    this.#rest += text
    const held = this.#rest.endsWith("\r") ? "\r" : "" // an LF may follow
    const lines = (held ? this.#rest.slice(0, -1) : this.#rest).replace(/\r\n?/g, "\n")
    const last = lines.lastIndexOf("\n\n")
    const end = last < 0 ? 0 : last + 2
    for (const block of lines.slice(0, end).split("\n\n")) this.#note(block)
    const comments = /^(?::.*\n)*/.exec(lines.slice(end))[0].length
    for (const line of lines.slice(end).split("\n").slice(0, -1)) this.#noteRetry(line)
    this.#rest = lines.slice(end + comments) + held
    return lines.slice(0, end + comments)
  }

  #note(block) {
    for (const line of block.split("\n")) {
      const id = /^id(?:$|: ?([^\0]*)$)/.exec(line)
      if (id) this.lastEventId = id[1] ?? ""
      this.#noteRetry(line)
      if (line === "data: [DONE]") this.#done = true
    }
    if (this.lastEventId === "end") this.#done = true
  }

  #noteRetry(line) {
    const retry = /^retry: ?(\d+)$/.exec(line)
    if (retry) this.#waitMs = Math.min(Number(retry[1]), LONGEST_WAIT_MS)
  }

  /** Waits before the next try: the server's time, doubled after each failure; until "online" at the latest. */
  async #pause() {
    const least = this.#failed ? Math.max(this.#waitMs, LEAST_WAIT_MS) : this.#waitMs
    const ms = Math.min(least * 2 ** this.#failed++, LONGEST_WAIT_MS) * (0.75 + Math.random() / 2)
    const over = new AbortController() // takes the listeners away
    let timer
    await new Promise((resolve) => {
      timer = setTimeout(resolve, ms)
      globalThis.addEventListener?.("online", resolve, { signal: over.signal })
      this.signal.addEventListener("abort", resolve, { signal: over.signal })
    })
    over.abort()
    clearTimeout(timer)
    this.signal.throwIfAborted()
  }
}

class BodyEventSource extends EventTarget {
  static CONNECTING = 0
  static OPEN = 1
  static CLOSED = 2
  readyState = 1
  lastEventId = ""
  #reader

  constructor(body) {
    super()
    this.#reader = body.pipeThrough(new TextDecoderStream()).getReader()
    this.#read()
  }

  close() {
    this.readyState = 2
    this.#reader.cancel().catch(() => {})
  }

  async #read() {
    let rest = ""
    let [type, data] = ["", []]
    const take = (line) => {
      const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line)
      if (field === "event") type = value
      else if (field === "data") data.push(value)
      else if (field === "id" && !value.includes("\0")) this.lastEventId = value
      if (line) return
      if (data.length) {
        this.dispatchEvent(
          new MessageEvent(type || "message", { data: data.join("\n"), lastEventId: this.lastEventId }),
        )
      }
      ;[type, data] = ["", []]
    }
    try {
      for (;;) {
        const { done, value } = await this.#reader.read()
        if (done) break
        rest += value
        const lines = rest.split(/\r\n|\n|\r(?!$)/)
        rest = lines.pop()
        for (const line of lines) if (this.readyState === 1) take(line)
      }
    } catch {
      // An `EventSource` reports no reason either.
    }
    if (this.readyState === 2) return
    this.readyState = 2
    this.dispatchEvent(new Event("error"))
  }
}
