/**
 * One stream, read by one `EventSource` after another.
 *
 * The browser reconnects with the last id. This class adds a pause, and retries after a response that makes an
 * `EventSource` give up, such as a proxy's 502; a `fetch` tells that from the end of a run and from a refusal.
 *
 * States: starting → connecting → open ⇄ reconnecting → ended; also waiting (for a slot), paused, and cut (by the
 * user). Outcomes: completed, failed, cancelled, or lost (a fleeting stream that was cut: reconnecting would run it
 * again).
 */

import { Problem } from "./service.js"

/** All event names of the service: an `EventSource` drops events without a listener. */
const NAMES = [
  "message", "init", "connected", "status", "thought", "thinking", "tool", "token", "reasoning", "usage", "progress",
  "countdown", "task", "item_error", "log", "result", "update", "config", "notification", "heartbeat", "gap",
  "complete", "done", "cancelled",
]
/** Pause after a cut by the user, long enough to be seen. */
export const CUT_MS = 2000
/** The first and the longest pause before a retry; it doubles. */
const RETRY_MS = [1000, 15000]

/** The run that an event id belongs to. */
export function runOf(id) {
  return /^([\w-]{22})\.\d+$/.exec(id)?.[1] ?? null
}

export class Connection {
  state = "starting"
  outcome = ""
  lastId = ""
  events = 0
  /** How often the stream resumed. A reconnect without an event doesn't count: it may have been refused. */
  resumed = 0
  #opens = 0
  /** No event since it was reopened. */
  #again = false
  /** @type {EventSource | null} */
  #source = null
  #retry = 0
  #timer = 0
  #listening = new Set(NAMES)

  /**
   * @param {(lastId: string) => string} address the URL to resume from this id; "" is the start
   * @param {object} options
   * @param {boolean} options.fleeting it can't be resumed
   * @param {(event: {type: string, data: string, id: string}) => void} options.onEvent
   * @param {() => void} options.onChange
   * @param {(problem: Problem) => void} options.onRefused
   */
  constructor(address, { fleeting, onEvent, onChange, onRefused }) {
    Object.assign(this, { address, fleeting, onEvent, onChange, onRefused })
  }

  get live() {
    return ["connecting", "open", "reconnecting", "cut"].includes(this.state)
  }

  open() {
    this.#close()
    const source = new EventSource(this.address(this.lastId))
    this.#source = source
    this.#set(this.#opens ? "reconnecting" : "connecting")
    const heard = (event) => this.#heard(source, event)
    for (const name of this.#listening) source.addEventListener(name, heard)
    source.addEventListener("open", () => this.#opened(source))
    source.addEventListener("error", (event) => {
      if (event instanceof MessageEvent) heard(event) // the service's own event of this name
      else this.#broke(source)
    })
  }

  /** Add an event name. */
  listen(name) {
    if (!name || this.#listening.has(name) || name === "error" || name === "open") return
    this.#listening.add(name)
    const source = this.#source
    source?.addEventListener(name, (event) => this.#heard(source, event))
  }

  /** Close the connection, as a tunnel would, and reconnect later with the last id. */
  cut() {
    if (this.state !== "open") return
    this.#close()
    if (this.fleeting) this.end("lost")
    else {
      this.#set("cut")
      this.#timer = setTimeout(() => this.open(), CUT_MS)
    }
  }

  /** @param {"paused" | "waiting"} state */
  pause(state) {
    if (this.state === "ended") return
    this.#close()
    this.#set(state)
  }

  end(outcome) {
    if (this.state === "ended") return
    this.#close()
    this.outcome = outcome
    this.#set("ended")
  }

  #close() {
    clearTimeout(this.#timer)
    this.#source?.close()
    this.#source = null
  }

  #set(state) {
    this.state = state
    this.onChange()
  }

  #opened(source) {
    if (source !== this.#source) return
    this.#again = this.#opens++ > 0
    this.#retry = 0
    this.#set("open")
  }

  #heard(source, event) {
    if (source !== this.#source) return
    if (event.lastEventId !== "end") this.lastId = event.lastEventId || this.lastId
    if (this.#again && this.events) this.resumed++
    this.#again = false
    this.events++
    this.onEvent({ type: event.type, data: event.data, id: event.lastEventId })
    if (event.lastEventId === "end") this.end("completed")
  }

  #broke(source) {
    if (source !== this.#source) return
    if (this.fleeting && this.#opens) this.end("lost")
    else if (source.readyState === EventSource.CLOSED) this.#ask()
    else this.#set(this.#opens ? "reconnecting" : "connecting")
  }

  /** The browser has given up. Find out whether it was the end (204), a refusal, or a proxy without its server. */
  async #ask() {
    this.#close()
    this.#set(this.#opens ? "reconnecting" : "connecting")
    const aborter = new AbortController()
    let response = null
    try {
      const headers = { Accept: "text/event-stream" }
      response = await fetch(this.address(this.lastId), { headers, cache: "no-store", signal: aborter.signal })
    } catch {
      // unreachable: treated like a 502
    }
    const status = response?.status ?? 0
    const refused = status >= 400 && status < 500 && !(status === 429 && this.#opens)
    const problem = refused ? await Problem.of(response) : null
    aborter.abort()
    if (this.state !== "connecting" && this.state !== "reconnecting") return // paused or ended meanwhile
    if (status === 204) this.end("completed")
    else if (problem) {
      this.onRefused(problem)
      this.end("failed")
    } else if (status === 200) this.open()
    else {
      const [first, most] = RETRY_MS
      this.#timer = setTimeout(() => this.open(), Math.min(first * 2 ** this.#retry++, most))
    }
  }
}
