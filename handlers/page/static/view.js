/** One stream on the page: its events so far, and the state of its connection. */

import { CUT_MS, Connection, runOf } from "./connection.js"
import { element, onEnter, plain, setText } from "./dom.js"
import { Bar, Facts, Figure, Log, Notes, Rows, Sources, Text, Timeline } from "./parts.js"
import { Problem, call } from "./service.js"
import { curlOf, scriptOf } from "./snippets.js"
import { interpreter } from "./vocabulary.js"

/**
 * The stream of a view; plain data, stored for a reload.
 * @typedef {object} Target
 * @property {string} title
 * @property {string} about such as the query or the topic
 * @property {string} route
 * @property {"run" | "fleeting" | "view" | "topic"} life
 * @property {string} url to read it from its start; the run's own URL once its id is known
 * @property {string | null} [run]
 * @property {string} [from] of a topic: the first id
 * @property {import("./snippets.js").Asked} [asked] the request that started it
 * @property {string} [talks] of a conversation: the catalog's stream for the next turn
 * @property {string} [said] of a conversation: the user's message
 * @property {Record<string, any>} [values] of a conversation: the form's other fields
 * @property {{said: string, url: string, run?: string}[]} [turns] of a conversation: the earlier turns, each a run
 */

/** In the order of display. */
const PARTS = {
  figure: Figure, bar: Bar, timeline: Timeline, reasoning: Text, text: Text, sources: Sources, rows: Rows, log: Log, notes: Notes,
  facts: Facts,
}
const WORDS = { lost: "cut off", open: "live", cut: "cut" }
const MOST_RAW = 200

export class View {
  #parts = {}
  #raw = []
  #drawing = false
  #interpret
  #started
  #cancelling = false
  #names = new Set()
  /** The current turn of a conversation; the last one is `target` itself. */
  #turn = 0
  /** The answers of the turns so far. */
  #answers = []
  #earlier = { events: 0, resumed: 0 }
  /** The note about a cut by the user, and the number of the last event before it. */
  #cutNote = null
  #cutAfter = 0

  /**
   * @param {Target} target
   * @param {object} board see board.js
   */
  constructor(target, board) {
    this.target = target
    this.board = board
    /** Fulfilled when the stream is open or waiting, rejected with a `Problem` if it was refused at once. */
    this.started = new Promise((fulfil, reject) => (this.#started = { fulfil, reject }))
    this.started.catch(() => {})
    this.#build()
    this.#begin()
  }

  /** Read a stream, or the next turn of a conversation, from its start. */
  #begin() {
    const { target } = this
    this.#interpret = interpreter(target.route)
    this.#parts = {}
    this.body = element("div", { class: "body" })
    if (target.talks) this.turns.append(element("p", { class: "said", role: "group", "aria-label": "You said" }, this.#current.said))
    this.turns.append(this.body)
    if (this.connection) {
      this.#earlier.events += this.connection.events
      this.#earlier.resumed += this.connection.resumed
    }
    const connection = new Connection((lastId) => this.#address(lastId), {
      fleeting: target.life === "fleeting",
      onEvent: (event) => this.#heard(event),
      onChange: () => this.connection === connection && this.#changed(),
      onRefused: (problem) => this.#refused(problem),
    })
    this.connection = connection
    this.#changed()
  }

  /** The stream or turn that is being read. */
  get #current() {
    return this.target.turns?.[this.#turn] ?? this.target
  }

  /** Whether this view shows the run, alone or as a turn. */
  shows(run) {
    return this.target.run === run || (this.target.turns ?? []).some((turn) => turn.run === run)
  }

  get resumable() {
    return this.target.life !== "fleeting"
  }

  get ended() {
    return this.connection.state === "ended"
  }

  #address(lastId) {
    const { url } = this.#current
    const { from } = this.target
    const after = lastId || from
    return after ? `${url}${url.includes("?") ? "&" : "?"}last_event_id=${encodeURIComponent(after)}` : url
  }

  // Elements

  #build() {
    const { title, about, route, life, talks } = this.target
    const heading = element("h3", {}, title)
    this.badge = element("span", { class: "badge" })
    this.cutButton = element("button", { class: "cut", type: "button", onclick: () => this.#cut() }, "Cut the connection")
    this.linkButton = element("a", { class: "quiet", target: "_blank", rel: "noopener", hidden: true }, "New tab")
    this.pauseButton = element("button", { class: "quiet", type: "button", onclick: () => this.#toggle() }, "Pause")
    this.cancelButton = element("button", { class: "quiet", type: "button", onclick: () => this.#cancel() }, "Cancel")
    const close = element("button", { class: "quiet close", type: "button", "aria-label": `Close ${title}` }, "×")
    close.addEventListener("click", () => this.board.close(this))
    this.turns = element("div", { class: "turns" })
    this.remarks = element("div", { class: "remarks" })
    this.raw = element("ol", { class: "raw", tabindex: "0", "aria-label": "Received events" })
    this.rawBox = element("details", { class: "events", ontoggle: () => this.#draw() }, element("summary", {}, "Events"))
    this.rawBox.append(this.raw)
    this.code = element("div", { class: "code" })
    this.codeBox = element("details", { class: "events", ontoggle: () => this.#drawCode() }, element("summary", {}, "Code"))
    this.codeBox.append(this.code)
    this.idFact = element("code")
    this.idLine = element("span", { class: "last-id", hidden: true }, "last id ", this.idFact)
    this.countFact = element("span", { class: "count" })
    this.resumedFact = element("span", { class: "resumed" })
    this.element = element(
      "article",
      { class: "view", "data-life": life, "data-route": route, "data-talks": talks, tabindex: "-1" },
      element("header", {}, heading, this.badge, close),
      about && !talks ? element("p", { class: "about" }, about) : null,
      element("p", { class: "route" }, element("code", {}, route), this.linkButton),
      this.turns,
      this.remarks,
      life === "topic" ? this.#publisher() : talks ? this.#answerer() : null,
      element("div", { class: "more" }, this.rawBox, this.codeBox),
      element(
        "footer",
        {},
        element("p", { class: "line" }, this.countFact, this.idLine, this.resumedFact),
        element("p", { class: "actions" }, this.cutButton, this.pauseButton, this.cancelButton),
      ),
    )
  }

  /** The part of this kind, created if needed, in the order of PARTS. */
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
    remark: (text, bad = false) => {
      // A conversation would repeat some at each turn.
      if (this.remarks.lastElementChild?.textContent !== text) {
        this.remarks.append(element("p", { class: bad ? "remark bad" : "remark" }, text))
      }
    },
  }

  #heard(event) {
    this.#remember(event.id)
    this.board.onEvent(this)
    this.#names.add(event.type)
    if (this.#cutNote) this.#resumed(event.id)
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

  /** The first id identifies a run, and the start of a topic's subscription. */
  #remember(id) {
    const { target } = this
    const run = runOf(id)
    if (!run || target.turns?.[this.#turn]) return
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

  /** Update what changes with each event, once a frame. */
  #draw() {
    const { lastId } = this.connection
    const events = this.connection.events + this.#earlier.events
    const resumed = this.connection.resumed + this.#earlier.resumed
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

  #drawCode() {
    if (!this.codeBox.open) return
    const { asked, route, run, url } = this.target
    const known = asked ?? { method: "GET", url }
    const blocks = [["curl", curlOf(known, this.board.signedIn)]]
    if (run && asked) blocks.push(["curl, the same run", curlOf({ method: "GET", url: `runs/${run}/events` }, this.board.signedIn)])
    if (route === "GET /topics/{name}") {
      const publish = { method: "POST", url: known.url, mediaType: "application/json", body: '{"text":"hello"}' }
      blocks.push(["curl, to publish", curlOf(publish, this.board.signedIn)])
    }
    blocks.push(["JavaScript", scriptOf(known, [...this.#names])])
    this.code.replaceChildren(...blocks.flatMap(([label, text]) => this.#block(label, text)))
  }

  #block(label, text) {
    const pre = element("pre", { tabindex: "0", "aria-label": `${label} for ${this.target.title}` }, text)
    const copy = element("button", { class: "quiet", type: "button", "aria-label": `Copy ${label}` }, "Copy")
    copy.hidden = !navigator.clipboard // plain http beyond loopback
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text).then(
        () => setText(copy, "Copied"),
        () => setText(copy, "Not allowed"),
      )
    })
    return [element("p", {}, label, copy), pre]
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
    this.cutButton.hidden = state !== "open" && state !== "cut"
    this.cutButton.ariaDisabled = String(state === "cut")
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
        this.#show.remark("The connection broke, and this stream can't resume: start it again.", true)
      }
      if (this.#cutNote) this.#noted(`You cut the connection after event ${this.#cutAfter}, which was the last one.`)
      this.#answers[this.#turn] = this.#parts.text?.text ?? ""
    }
    this.#draw()
    this.board.onState(this)
    if (state === "ended" && this.#turn < (this.target.turns?.length ?? 0) && outcome !== "closed") this.#goOn()
  }

  #goOn() {
    this.#turn++
    this.#begin()
    this.board.resume(this)
  }

  #refused(problem) {
    this.#started.reject(problem)
    this.#show.remark(problem.message, true)
  }

  // Actions

  #toggle() {
    if (this.connection.live) this.board.pause(this)
    else this.board.resume(this)
  }

  /** Cut the connection, to show how the stream resumes. */
  #cut() {
    if (this.connection.state !== "open") return
    if (this.resumable) {
      this.#cutNote?.remove()
      this.#cutAfter = numberOf(this.connection.lastId)
      const pause = `Reconnecting in ${CUT_MS / 1000} s with the last id.`
      this.#cutNote = element("p", { class: "remark cut-note", role: "status" }, `You cut the connection after event ${this.#cutAfter}. ${pause}`)
      this.remarks.append(this.#cutNote)
    }
    this.connection.cut()
  }

  #resumed(id) {
    if (numberOf(id)) this.#noted(`You cut the connection after event ${this.#cutAfter}. It resumed with event ${numberOf(id)}.`)
  }

  #noted(text) {
    setText(this.#cutNote, text)
    this.#cutNote = null
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

  /** The form for the next turn of a conversation, which is another run. */
  #answerer() {
    const text = element("textarea", { "aria-label": "Your reply", placeholder: "Reply", rows: "1" })
    const error = element("p", { class: "error", role: "alert" })
    const form = element("form", { class: "publish answer", autocomplete: "off" }, text)
    form.append(element("button", { type: "submit" }, "Send"), error)
    onEnter(text, true, () => form.requestSubmit())
    let sending = false
    const send = async () => {
      const said = text.value.trim()
      if (!said || sending) return
      if (!this.ended) {
        setText(error, "The answer isn't complete yet.")
        return
      }
      sending = true
      setText(error, "")
      try {
        const { target } = this
        const { said: before, url, run, turns = [] } = target
        const all = [...turns, { said: before, url, run }]
        const next = await this.board.next(target, said, all.map((turn, at) => ({ said: turn.said, answer: this.#answers[at] ?? "" })))
        text.value = ""
        Object.assign(target, next, { turns: all })
        this.board.onKnown(this)
        this.#goOn()
      } catch (problem) {
        setText(error, problem instanceof Problem ? problem.message : String(problem))
      }
      sending = false
    }
    form.addEventListener("submit", (event) => {
      event.preventDefault()
      send()
    })
    return form
  }

  /** A form to publish to the topic. */
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

/** The number of an event in its run or topic, or 0. */
function numberOf(id) {
  return Number(/\.(\d+)$/.exec(id)?.[1] ?? 0)
}

/** JSON as typed; other input becomes a text. */
function asJson(typed) {
  try {
    JSON.parse(typed)
    return typed
  } catch {
    return JSON.stringify({ text: typed })
  }
}
