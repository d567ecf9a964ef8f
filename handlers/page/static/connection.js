/**
 * One stream, over one browser's own `EventSource` after another.
 *
 * The browser itself reconnects with the last id. What it can't do is done here: a pause and a resumption long after;
 * and life after an answer that `EventSource` takes as final (a proxy's 502), which it tells from the end of a run, or
 * from a refusal, by asking once with `fetch`.
 *
 * States: starting → connecting → open ⇄ reconnecting → ended; waiting (for a slot), paused, and cut (by somebody who
 * wants to see what becomes of it) besides. An end has an outcome: completed, failed, cancelled, or lost (a fleeting
 * stream that was cut: to reconnect would run it again).
 */

import { Problem } from "./service.js"

/** Every event name of the service. `EventSource` gives nobody the events whose name nobody listens for. */
const NAMES = [
  "message", "init", "connected", "status", "thought", "thinking", "tool", "token", "reasoning", "usage", "progress",
  "countdown", "task", "item_error", "log", "result", "update", "config", "notification", "heartbeat", "gap",
  "complete", "done", "cancelled",
]
/** How long a connection that was cut by hand is away: long enough to be seen. */
export const CUT_MS = 2000
/** The first pause before asking again, doubled up to the last. */
const RETRY_MS = [1000, 15000]

/** The run that an event id is of. */
export function runOf(id) {
  return /^([\w-]{22})\.\d+$/.exec(id)?.[1] ?? null
}

export class Connection {
  state = "starting"
  outcome = ""
  lastId = ""
  events = 0
  /** How often events came again after a break or a pause. An answer without any may be a soft refusal. */
  resumed = 0
  #opens = 0
  /** No event has come since it was opened again. */
  #again = false
  /** @type {EventSource | null} */
  #source = null
  #retry = 0
  #timer = 0
  #listening = new Set(NAMES)

  /**
   * @param {(lastId: string) => string} address where to go on after this id; "" is the start
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

  /** Listen for one more event name, from now on. */
  listen(name) {
    if (!name || this.#listening.has(name) || name === "error" || name === "open") return
    this.#listening.add(name)
    const source = this.#source
    source?.addEventListener(name, (event) => this.#heard(source, event))
  }

  /** Close the connection in the middle, as a tunnel does, and come back later with the last id. */
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

  /** The browser has given up: because of the end (204), a refusal, or a proxy with nobody behind it? */
  async #ask() {
    this.#close()
    this.#set(this.#opens ? "reconnecting" : "connecting")
    const aborter = new AbortController()
    let response = null
    try {
      const headers = { Accept: "text/event-stream" }
      response = await fetch(this.address(this.lastId), { headers, cache: "no-store", signal: aborter.signal })
    } catch {
      // not reachable: the same as a 502
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
