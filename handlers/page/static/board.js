/**
 * The open streams: live ones, ones that wait for a slot, and ones reopened after a reload.
 *
 * They are stored in the tab's session storage. After a reload a run is read from its start, so that its view is
 * complete, and a topic from where it was subscribed to. A fleeting stream ends with its page.
 */

import { element } from "./dom.js"
import { Slots } from "./slots.js"
import { View } from "./view.js"

const STORAGE = "sseapp.open"
/** Beyond this, views are closed, first those that ended longest ago. */
const MOST_VIEWS = 24
/** Below a view, in pixels. */
const GAP = 20

export class Board {
  /** @type {View[]} newest first */
  #views = []
  /** @type {Map<View, () => Promise<void>>} */
  #slots = new Map()
  #pool = new Slots(() => this.#next())
  #connecting = new Set()
  /** A view spans one row of the grid (a pixel) for each pixel of its height, so columns have no holes. */
  #heights = new ResizeObserver((entries) => {
    for (const { target } of entries) target.style.gridRowEnd = `span ${Math.ceil(target.offsetHeight) + GAP}`
  })

  /**
   * @param {HTMLElement} place
   * @param {object} hooks
   * @param {(view: View) => void} hooks.onEvent
   * @param {(live: number, most: number, waiting: number) => void} hooks.onCount
   * @param {(text: string) => void} hooks.announce
   * @param {() => void} hooks.onRuns the list of runs may have changed
   * @param {(target: object) => void} hooks.onRun the id of a run became known
   * @param {(view: View) => void} hooks.onClose
   * @param {(view: View) => void} hooks.onEnd
   * @param {() => boolean} hooks.signedIn the service requires a token
   * @param {(target: object, said: string, turns: object[]) => Promise<object>} hooks.next of a conversation
   */
  constructor(place, hooks) {
    this.place = place
    this.hooks = hooks
    this.empty = element(
      "p",
      { class: "empty" },
      "No stream is open. Start one, or open one of your runs to read it from its beginning.",
    )
    this.waitingText = `Waiting for a free connection: at most ${this.#pool.count} streams can be open in all tabs, because a browser opens only 6 connections to a site. Pause or close another stream.`
    this.#changed()
  }

  get signedIn() {
    return this.hooks.signedIn()
  }

  /** The next turn of a conversation; rejected with a `Problem`. */
  next(target, said, turns) {
    return this.hooks.next(target, said, turns)
  }

  onEvent = (view) => this.hooks.onEvent(view)

  /** A view has received the id of its stream. */
  onKnown(view) {
    this.#save()
    if (view.target.life === "run") {
      this.hooks.onRun(view.target)
      this.hooks.onRuns()
    }
  }

  onState(view) {
    const { state, outcome } = view.connection
    if (["ended", "paused"].includes(state)) this.#release(view)
    if (view.said !== state && this.#views.includes(view)) {
      view.said = state
      if (["ended", "reconnecting", "paused"].includes(state)) this.hooks.announce(`${view.target.title}: ${outcome || state}`)
      if (state === "ended") {
        this.hooks.onRuns()
        this.hooks.onEnd(view)
      }
    }
    this.#changed()
  }

  /**
   * Open a stream, or show its view if there is one.
   * @param {import("./view.js").Target} target
   * @param {boolean} [restored] it was open before the reload, and takes no slot of another stream
   * @returns {Promise<View>} rejected with a `Problem` if it is refused at once; then the view is removed
   */
  async open(target, restored = false) {
    const known = target.run ? this.#views.find((view) => view.shows(target.run)) : null
    if (known) {
      known.element.focus()
      return known
    }
    const view = new View(target, this)
    this.#views.unshift(view)
    this.#forgetOldest()
    this.place.prepend(view.element)
    this.#heights.observe(view.element)
    this.#changed()
    this.#save()
    if (target.run) this.hooks.onRun(target)
    this.#connect(view, !restored)
    try {
      await view.started
    } catch (problem) {
      if (!restored) {
        this.close(view)
        throw problem
      }
    }
    return view
  }

  resume(view) {
    if (!view.ended) this.#connect(view, true)
  }

  pause(view) {
    view.connection.pause("paused")
  }

  close(view) {
    const at = this.#views.indexOf(view)
    if (at < 0) return
    this.#views.splice(at, 1)
    view.connection.end("closed")
    this.#release(view)
    const focused = view.element.contains(document.activeElement)
    this.#heights.unobserve(view.element)
    view.element.remove()
    if (focused) (this.#views[Math.min(at, this.#views.length - 1)]?.element ?? this.place).focus()
    this.#save()
    this.#changed()
    this.hooks.onClose(view)
  }

  closeAll() {
    for (const view of [...this.#views]) this.close(view)
  }

  /** Reopen the streams from before a reload, oldest first, to keep the order. */
  restore() {
    let targets = []
    try {
      targets = JSON.parse(sessionStorage.getItem(STORAGE) ?? "[]")
    } catch {
      // written by another version
    }
    for (const target of targets.reverse()) this.open(target, true)
  }

  #save() {
    const targets = this.#views.filter((view) => view.resumable).map((view) => view.target)
    try {
      sessionStorage.setItem(STORAGE, JSON.stringify(targets))
    } catch {
      // full or forbidden: a reload then starts with an empty board
    }
  }

  /** Get the view a slot. A new view takes the slot of the oldest resumable one. */
  async #connect(view, insists) {
    if (this.#slots.has(view) || this.#connecting.has(view)) return
    this.#connecting.add(view)
    let slot = await this.#pool.take()
    if (!slot && insists) {
      const oldest = this.#views.findLast((other) => other.resumable && other !== view && this.#slots.has(other))
      if (oldest) {
        slot = this.#slots.get(oldest) // handed over, since any tab could take a free slot
        this.#slots.delete(oldest)
        oldest.connection.pause("waiting")
      }
    }
    this.#connecting.delete(view)
    if (slot && (view.ended || !this.#views.includes(view))) await slot() // closed meanwhile
    else if (slot) {
      this.#slots.set(view, slot)
      view.connection.open()
    } else view.connection.pause("waiting")
    this.#changed()
  }

  async #release(view) {
    const slot = this.#slots.get(view)
    this.#slots.delete(view)
    await slot?.()
  }

  /** A slot may be free: give it to the view that has waited longest. */
  #next() {
    const view = this.#views.findLast((other) => other.connection.state === "waiting" && !this.#connecting.has(other))
    if (view) this.#connect(view, false)
  }

  #forgetOldest() {
    while (this.#views.length > MOST_VIEWS) {
      this.close(this.#views.findLast((view) => view.ended) ?? this.#views.at(-1))
    }
  }

  #changed() {
    if (this.#views.length) this.empty.remove()
    else this.place.append(this.empty)
    const waiting = this.#views.filter((view) => view.connection.state === "waiting").length
    this.hooks.onCount(this.#views.filter((view) => view.connection.live).length, this.#pool.count, waiting)
  }
}
