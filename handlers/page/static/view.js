/** One stream on the page: what it said so far, and the state of its connection. */

import { Connection, runOf } from "./connection.js"
import { element, plain, setText } from "./dom.js"
import { Bar, Facts, Figure, Log, Notes, Rows, Sources, Text, Timeline } from "./parts.js"
import { Problem, call } from "./service.js"
import { interpreter } from "./vocabulary.js"

/**
 * What is watched; plain data, so that it can be remembered over a reload.
 * @typedef {object} Target
 * @property {string} title
 * @property {string} about what of it is special: the query, the topic
 * @property {string} route
 * @property {"run" | "fleeting" | "view" | "topic"} life
 * @property {string} url where it is read from its start; a run's own once its id is known
 * @property {string | null} [run]
 * @property {string} [from] of a topic: the id that its first subscription began at
 */

/** In the order in which they stand, whichever came first. */
const PARTS = {
  figure: Figure, bar: Bar, timeline: Timeline, reasoning: Text, text: Text, sources: Sources, rows: Rows, log: Log, notes: Notes,
  facts: Facts,
}
const WORDS = { lost: "cut off", open: "live" }
const MOST_RAW = 200

export class View {
  #parts = {}
  #raw = []
  #drawing = false
  #interpret
  #started
  #cancelling = false

  /**
   * @param {Target} target
   * @param {object} board what it tells of itself: onEvent, onState, onKnown, resume, pause, close
   */
  constructor(target, board) {
    this.target = target
    this.board = board
    this.#interpret = interpreter(target.route)
    /** Fulfilled when the stream is open or waits for its turn, rejected with a `Problem` where it was refused at once. */
    this.started = new Promise((fulfil, reject) => (this.#started = { fulfil, reject }))
    this.started.catch(() => {})
    this.connection = new Connection((lastId) => this.#address(lastId), {
      fleeting: target.life === "fleeting",
      onEvent: (event) => this.#heard(event),
      onChange: () => this.#changed(),
      onRefused: (problem) => this.#refused(problem),
    })
    this.#build()
  }

  /** It can be left and taken up again. */
  get resumable() {
    return this.target.life !== "fleeting"
  }

  get ended() {
    return this.connection.state === "ended"
  }

  #address(lastId) {
    const { url, from } = this.target
    const after = lastId || from
    return after ? `${url}${url.includes("?") ? "&" : "?"}last_event_id=${encodeURIComponent(after)}` : url
  }

  // What the page shows of it

  #build() {
    const { title, about, route, life } = this.target
    const heading = element("h3", {}, title, about ? element("span", {}, about) : null)
    this.badge = element("span", { class: "badge" })
    this.linkButton = element("a", { class: "quiet", target: "_blank", rel: "noopener", hidden: true }, "New tab")
    this.pauseButton = element("button", { class: "quiet", type: "button", onclick: () => this.#toggle() }, "Pause")
    this.cancelButton = element("button", { class: "quiet", type: "button", onclick: () => this.#cancel() }, "Cancel")
    const close = element("button", { class: "quiet close", type: "button", "aria-label": `Close ${title}` }, "×")
    close.addEventListener("click", () => this.board.close(this))
    this.body = element("div", { class: "body" })
    this.remarks = element("div", { class: "remarks" })
    this.raw = element("ol", { class: "raw", tabindex: "0", "aria-label": "Events as they came" })
    this.rawBox = element("details", { class: "events", ontoggle: () => this.#draw() }, element("summary", {}, "Events"))
    this.rawBox.append(this.raw)
    this.idFact = element("code")
    this.idLine = element("span", { class: "last-id", hidden: true }, "last id ", this.idFact)
    this.countFact = element("span", { class: "count" })
    this.resumedFact = element("span", { class: "resumed" })
    this.element = element(
      "article",
      { class: "view", "data-life": life, "data-route": route, tabindex: "-1" },
      element("header", {}, heading, this.badge),
      element("p", { class: "route" }, element("code", {}, route)),
      this.body,
      this.remarks,
      life === "topic" ? this.#publisher() : null,
      this.rawBox,
      element(
        "footer",
        {},
        element("p", { class: "line" }, this.countFact, this.idLine, this.resumedFact),
        element("p", { class: "actions" }, this.linkButton, this.pauseButton, this.cancelButton, close),
      ),
    )
    this.#changed()
  }

  /** The part of this kind, made now if it isn't there; parts stand in the order of their table. */
  #part(kind) {
    if (!this.#parts[kind]) {
      const part = (this.#parts[kind] = new PARTS[kind]())
      const order = Object.keys(PARTS)
      part.element.dataset.part = kind
      const next = [...this.body.children].find((node) => order.indexOf(node.dataset.part) > order.indexOf(kind))
      this.body.insertBefore(part.element, next ?? null)
    }
    return this.#parts[kind]
  }

  /** @type {import("./vocabulary.js").Show} */
  #show = {
    bar: (percent, label) => this.#part("bar").set(percent, label),
    line: (level, text, about) => this.#part("log").add(level, text, about),
    token: (piece) => this.#part("text").add(piece),
    answer: (text) => this.#part("text").set(text),
    reasoning: (piece) => this.#part("reasoning").add(piece),
    step: (kind, title, detail) => this.#part("timeline").add(kind, title, detail),
    call: (tool, asked) => this.#part("timeline").call(tool, asked),
    returned: (tool, result) => this.#part("timeline").result(tool, result),
    row: (row) => this.#part("rows").add(row),
    note: (kind, data) => this.#part("notes").add(kind, data),
    facts: (facts) => this.#part("facts").set(facts),
    figure: (text) => this.#part("figure").set(text),
    sources: (sources) => this.#part("sources").set(sources),
    remark: (text, bad = false) => this.remarks.append(element("p", { class: bad ? "remark bad" : "remark" }, text)),
  }

  #heard(event) {
    this.#remember(event.id)
    this.board.onEvent()
    this.#raw.push(event)
    if (this.#raw.length > 2 * MOST_RAW) this.#raw = this.#raw.slice(-MOST_RAW)
    const outcome = this.#interpret(this.#show, event)
    if (outcome) this.connection.end(outcome)
    if (!this.#drawing) {
      this.#drawing = true
      requestAnimationFrame(() => {
        this.#drawing = false
        this.#draw()
      })
    }
  }

  /** From the first id on a run is found by its own name, and a topic from where it was subscribed to. */
  #remember(id) {
    const { target } = this
    const run = runOf(id)
    if (!run) return
    if (target.life === "topic" && !target.from) {
      target.from = id
      this.board.onKnown(this)
    } else if (target.life === "run" && !target.run) {
      target.run = run
      target.url = `runs/${run}/events`
      this.board.onKnown(this)
      this.#changed()
    }
  }

  /** What changes with each event, once a frame. */
  #draw() {
    const { lastId, events, resumed } = this.connection
    setText(this.countFact, `${events.toLocaleString("en")} event${events === 1 ? "" : "s"}`)
    const [epoch, sequence] = lastId.split(".")
    setText(this.idFact, `${epoch.slice(0, 4)}….${sequence}`)
    this.idLine.title = lastId
    this.idLine.hidden = !lastId
    setText(this.resumedFact, resumed ? `resumed ${resumed}×` : "")
    if (this.rawBox.open) {
      const items = this.#raw.slice(-MOST_RAW).map(({ type, id, data }) => {
        const number = id.slice(id.lastIndexOf(".") + 1)
        return element("li", {}, element("i", {}, number), element("b", {}, type), element("span", {}, plain(data)))
      })
      this.raw.replaceChildren(...items)
      this.raw.scrollTop = this.raw.scrollHeight
    }
  }

  #changed() {
    const { state, outcome, live } = this.connection
    const word = state === "ended" ? outcome : state
    setText(this.badge, WORDS[word] ?? word)
    this.badge.dataset.state = word
    this.element.dataset.state = state
    const { run } = this.target
    this.linkButton.hidden = !run
    if (run) this.linkButton.href = `#run=${run}`
    this.pauseButton.hidden = this.ended || !this.resumable
    setText(this.pauseButton, live ? "Pause" : "Resume")
    this.cancelButton.hidden = this.ended || !run || this.#cancelling
    if (state === "open" || state === "waiting") this.#started.fulfil()
    if (state === "waiting" && !this.waiting) {
      this.waiting = element("p", { class: "remark" }, this.board.waitingText)
      this.remarks.append(this.waiting)
    } else if (state !== "waiting" && this.waiting) {
      this.waiting.remove()
      this.waiting = null
    }
    if (state === "ended") {
      this.#started.fulfil()
      for (const part of Object.values(this.#parts)) part.settle?.()
      if (outcome === "lost" && this.target.life === "fleeting") {
        this.#show.remark("The line broke. This stream ends with its connection: start it again.", true)
      }
    }
    this.#draw()
    this.board.onState(this)
  }

  #refused(problem) {
    this.#started.reject(problem)
    this.#show.remark(problem.message, true)
  }

  // What one does to it

  #toggle() {
    if (this.connection.live) this.board.pause(this)
    else this.board.resume(this)
  }

  async #cancel() {
    this.#cancelling = true
    this.#changed()
    try {
      await call(`runs/${this.target.run}`, { method: "DELETE" })
    } catch (problem) {
      this.#show.remark(problem.message, true)
    }
    this.#cancelling = false
    if (!this.connection.live) this.board.resume(this) // to see its end
    this.#changed()
  }

  /** A small form on a topic: what is published is seen by every tab that reads it. */
  #publisher() {
    const { route, url } = this.target
    const user = route.startsWith("GET /users/")
    const [path] = url.split("?")
    const names = user ? ["notification", "message"] : ["message", "alert", "update"]
    const kind = user
      ? element("select", { "aria-label": "Kind" }, ...names.map((name) => element("option", {}, name)))
      : element("input", { "aria-label": "Event name", value: "message", maxlength: "100", size: "9" })
    const text = element("input", { "aria-label": "Text or JSON to publish", placeholder: "Text or JSON" })
    const error = element("p", { class: "error", role: "alert" })
    const publish = async () => {
      const address = user
        ? path.replace(/stream$/, `${kind.value}s`)
        : `${path}?event=${encodeURIComponent(kind.value)}`
      this.connection.listen(kind.value)
      try {
        await call(address, {
          method: "POST",
          headers: { "Content-Type": "application/json" },
          body: asJson(text.value),
        })
        text.value = ""
        setText(error, "")
      } catch (problem) {
        setText(error, problem instanceof Problem ? problem.message : String(problem))
      }
    }
    const form = element("form", { class: "publish", autocomplete: "off" }, kind, text)
    form.append(element("button", { type: "submit" }, "Publish"), error)
    form.addEventListener("submit", (event) => {
      event.preventDefault()
      publish()
    })
    return form
  }
}

/** JSON as it was typed; anything else is a text. */
function asJson(typed) {
  try {
    JSON.parse(typed)
    return typed
  } catch {
    return JSON.stringify({ text: typed })
  }
}
