/**
 * My runs: open, cancel, delete.
 *
 * Without authentication the service can't tell callers apart and doesn't list runs (403). Then the page lists the runs
 * that were started in this browser.
 */

import { clock, element, setText } from "./dom.js"
import { Problem, call } from "./service.js"

const STORAGE = "sseapp.runs"
const MOST_KEPT = 50
const MOST_SHOWN = 8
/** While a run is running and the page is visible. */
const LOOK_AGAIN_MS = 3000

export class RunList {
  #runs = []
  #all = false
  #ownList = false
  #timer = 0
  #asking = false
  #again = false

  /**
   * @param {HTMLElement} place
   * @param {HTMLElement} summary how many there are, by state
   * @param {object} hooks
   * @param {(run: {run: string, route: string}) => void} hooks.onOpen
   * @param {(route: string) => string} hooks.nameOf a route's name on the page
   */
  constructor(place, summary, { onOpen, nameOf }) {
    Object.assign(this, { summary, onOpen, nameOf })
    this.list = element("ol", { class: "runs" })
    this.note = element("p", { class: "hint" })
    this.complaint = element("p", { class: "error", role: "alert" })
    this.more = element("button", { class: "quiet", type: "button", hidden: true }, "Show all")
    this.more.addEventListener("click", () => {
      this.#all = !this.#all
      this.#draw()
    })
    place.append(this.complaint, this.list, this.note, this.more)
    document.addEventListener("visibilitychange", () => this.refresh())
  }

  /** Store a run of this page, in case the service doesn't list runs. */
  remember({ run, route, title }) {
    const others = kept().filter((other) => other.run !== run)
    keep([{ run, route, title }, ...others])
  }

  /** Show events that the page received; the list is refreshed only every few seconds. */
  count(run, events) {
    const known = this.#runs.find((other) => other.run === run)
    if (!known || known.events >= events) return
    known.events = events
    const place = this.list.querySelector(`[data-run="${run}"] .events-so-far`)
    if (place) setText(place, counted(events))
  }

  /** Delete the runs stored in this browser. */
  clear() {
    keep([])
    this.#runs = []
    this.#ownList = false
    this.#draw()
    setText(this.note, "")
  }

  /** Show an error. */
  say(text) {
    setText(this.complaint, text)
  }

  async refresh() {
    if (this.#asking || document.hidden) {
      this.#again = this.#asking
      return
    }
    this.#asking = true
    clearTimeout(this.#timer)
    try {
      this.#runs = await this.#ask()
      this.#draw()
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem
      setText(this.note, problem.status === 401 ? "" : problem.message)
    }
    this.#asking = false
    const working = this.#runs.some((run) => run.state === "running")
    if (this.#again) {
      this.#again = false
      this.refresh()
    } else if (working) this.#timer = setTimeout(() => this.refresh(), LOOK_AGAIN_MS)
  }

  async #ask() {
    if (!this.#ownList) {
      try {
        return (await (await call("runs")).json()).runs
      } catch (problem) {
        if (problem.status !== 403) throw problem
        this.#ownList = true
      }
    }
    const asked = await Promise.all(kept().map(({ run, route }) => this.#state(run, route)))
    return asked.filter((run) => run !== null)
  }

  async #state(run, route) {
    const known = this.#runs.find((other) => other.run === run)
    if (known && known.state !== "running") return known
    try {
      return await (await call(`runs/${run}`)).json()
    } catch (problem) {
      if (problem.status === 404) keep(kept().filter((other) => other.run !== run))
      return problem.status === 404 ? null : { run, route, state: "unknown", events: 0 }
    }
  }

  #draw() {
    const shown = this.#all ? this.#runs : this.#runs.slice(0, MOST_SHOWN)
    const focused = document.activeElement?.dataset?.focus
    this.list.replaceChildren(...shown.map((run) => this.#item(run)))
    if (focused) this.list.querySelector(`[data-focus="${focused}"]`)?.focus()
    const over = this.#runs.length - MOST_SHOWN
    this.more.hidden = over <= 0
    setText(this.more, this.#all ? "Show fewer" : `Show ${over} more`)
    const states = new Map()
    for (const { state } of this.#runs) states.set(state, (states.get(state) ?? 0) + 1)
    const parts = [...states].map(([state, count]) => element("span", { class: "badge", "data-state": state }, `${count} ${state}`))
    this.summary.replaceChildren(...parts)
    const whose = this.#ownList ? "Without authentication, only runs started in this browser are listed." : ""
    setText(this.note, this.#runs.length ? whose : `No runs yet. ${whose}`)
  }

  #item(run) {
    const { run: id, route, about, state, events, created } = run
    const running = state === "running"
    const name = this.nameOf(route)
    const open = element("a", { href: `#run=${id}`, "data-focus": `open-${id}`, title: about || null }, about || name)
    open.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return // the browser opens another tab
      event.preventDefault()
      this.onOpen(run)
    })
    const remove = element(
      "button",
      { class: "quiet", type: "button", "data-focus": `remove-${id}`, onclick: () => this.#remove(run) },
      running ? "Cancel" : "Delete",
    )
    remove.setAttribute("aria-label", `${running ? "Cancel" : "Delete"} ${about || name}, ${clock(created)}`)
    return element(
      "li",
      { "data-run": id, "data-state": state },
      open,
      element(
        "p",
        {},
        element("span", { class: "badge", "data-state": state }, state),
        about ? element("span", {}, name) : null,
        element("span", { class: "events-so-far" }, counted(events)),
        element("time", { datetime: created }, when(created)),
      ),
      remove,
    )
  }

  async #remove({ run, state }) {
    try {
      await call(`runs/${run}`, { method: "DELETE" })
      if (state !== "running") {
        keep(kept().filter((other) => other.run !== run))
        this.#runs = this.#runs.filter((other) => other.run !== run)
      }
      this.say("")
    } catch (problem) {
      this.say(problem.message)
    }
    this.refresh()
  }
}

const counted = (events) => `${events.toLocaleString("en")} event${events === 1 ? "" : "s"}`

/** The time; for another day with the date. */
function when(created) {
  const date = new Date(created)
  if (Number.isNaN(date.getTime())) return ""
  const today = date.toDateString() === new Date().toDateString()
  const time = clock(date).slice(0, 5)
  return today ? time : `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${time}`
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(STORAGE) ?? "[]")
  } catch {
    return []
  }
}

function keep(runs) {
  try {
    localStorage.setItem(STORAGE, JSON.stringify(runs.slice(0, MOST_KEPT)))
  } catch {
    // full or forbidden: the runs are then reachable only by their links
  }
}
