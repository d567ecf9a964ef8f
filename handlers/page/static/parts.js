/** The parts of a view. Each is created by its first event, and keeps a bounded number of nodes. */

import { clock, element, plain, setText } from "./dom.js"

/** Older log lines, rows and notes are removed from the page, not from the log. */
const MOST_ITEMS = 300
/** Twice the longest answer. */
const MOST_CHARACTERS = 400_000

/**
 * A list that drops its oldest items, and scrolls with its end unless the user has scrolled away.
 *
 * Items are added once a frame, and those that would be dropped in the same frame are never made: a stream may send ten
 * thousand a second, and reading the scroll position costs a layout.
 */
class Roll {
  #coming = []
  #forgotten = 0

  constructor(label, tag, attributes) {
    this.list = element(tag, attributes)
    this.before = element("p", { class: "forgotten", hidden: true })
    // Not a live region: a screen reader would announce hundreds of items a second.
    this.scroller = element("div", { class: "roll", tabindex: "0", role: "group", "aria-label": label }, this.before, this.list)
  }

  /** @param {() => Node} make */
  add(make) {
    if (!this.#coming.length) requestAnimationFrame(() => this.flush())
    this.#coming.push(make)
    if (this.#coming.length > 2 * MOST_ITEMS) {
      // a hidden tab has no frames
      this.#forgotten += MOST_ITEMS
      this.#coming.splice(0, MOST_ITEMS)
    }
  }

  flush() {
    const { scroller, list } = this
    const coming = this.#coming.slice(-MOST_ITEMS)
    if (!coming.length) return
    this.#forgotten += this.#coming.length - coming.length
    this.#coming = []
    const follows = scroller.scrollTop + scroller.clientHeight >= scroller.scrollHeight - 8
    list.append(...coming.map((make) => make()))
    while (list.childElementCount > MOST_ITEMS) {
      list.firstElementChild.remove()
      this.#forgotten++
    }
    this.before.hidden = !this.#forgotten
    setText(this.before, `${this.#forgotten.toLocaleString("en")} earlier not shown`)
    if (follows) scroller.scrollTop = scroller.scrollHeight
  }
}

export class Bar {
  #label = element("span", { class: "step" })
  #figure = element("span", { class: "percent" })
  #bar = element("progress", { max: "100" })
  element = element("label", { class: "bar" }, element("span", {}, this.#label, this.#figure), this.#bar)

  /** @param {number | null} percent null if the total is unknown */
  set(percent, label = "") {
    if (percent === null) this.#bar.removeAttribute("value")
    else this.#bar.value = percent
    setText(this.#figure, percent === null ? "" : `${Math.round(percent)} %`)
    setText(this.#label, label)
  }

  settle() {
    if (!this.#bar.hasAttribute("value")) this.#bar.value = 0
  }
}

export class Log {
  #roll = new Roll("Log", "ol", { class: "log" })
  element = this.#roll.scroller

  /** @param {{label?: string, time?: string, details?: unknown}} [about] */
  add(level, text, { label = "", time = Date.now(), details } = {}) {
    this.#roll.add(() => {
      const line = element("li", { "data-level": level }, element("time", {}, clock(time)))
      if (label) line.append(element("b", {}, label))
      line.append(element("span", {}, text))
      const more = flat(details)
      if (more) line.append(element("small", {}, more))
      return line
    })
  }

  settle() {
    this.#roll.flush()
  }
}

export class Text {
  #node = document.createTextNode("")
  #pieces = []
  element = element("p", { class: "text" }, this.#node)

  /** Pieces are added once a frame: a thousand tokens are not a thousand layouts. */
  add(piece) {
    if (!this.#pieces.length) requestAnimationFrame(() => this.flush())
    this.#pieces.push(piece)
  }

  flush() {
    if (!this.#pieces.length) return
    const { element } = this
    const follows = element.scrollTop + element.clientHeight >= element.scrollHeight - 8
    this.#node.appendData(this.#pieces.join(""))
    this.#pieces = []
    const over = this.#node.length - MOST_CHARACTERS
    if (over > 0) this.#node.deleteData(0, over)
    if (follows) element.scrollTop = element.scrollHeight
  }

  get text() {
    return this.#node.data + this.#pieces.join("")
  }

  /** Replace the text by an event that repeats all of it. */
  set(text) {
    this.#pieces = []
    setText(this.#node, text)
  }

  settle() {
    this.flush()
  }
}

export class Timeline {
  element = element("ol", { class: "timeline" })
  #calls = new Map()

  /** @param {string} kind status, thought, plan or tool */
  add(kind, title, detail = "") {
    this.element.querySelector("[data-at]")?.removeAttribute("data-at")
    const step = element("li", { "data-kind": kind, "data-at": true }, element("span", { class: "what" }, title))
    if (detail) step.append(element("span", { class: "detail" }, detail))
    this.element.append(step)
    if (this.element.childElementCount > MOST_ITEMS) this.element.firstElementChild.remove()
    return step
  }

  /** One step for a tool's call and its result. */
  call(tool, asked) {
    const step = this.add("tool", tool, plain(asked))
    step.setAttribute("data-calling", "")
    this.#calls.set(tool, step)
  }

  result(tool, result) {
    const step = this.#calls.get(tool) ?? this.add("tool", tool)
    this.#calls.delete(tool)
    step.removeAttribute("data-calling")
    const short = flat(result)
    if (short.length <= 90) {
      step.append(element("span", { class: "detail" }, short))
      return
    }
    const found = Array.isArray(result) ? result.length : result?.found
    const summary = typeof found === "number" ? `${found} found` : `${short.slice(0, 80)}…`
    const whole = typeof result === "string" ? result : JSON.stringify(result, null, 2)
    step.append(element("details", {}, element("summary", {}, summary), element("pre", { tabindex: "0" }, whole)))
  }

  settle() {
    this.element.querySelector("[data-at]")?.removeAttribute("data-at")
    for (const step of this.#calls.values()) step.removeAttribute("data-calling")
  }
}

export class Rows {
  #roll
  #columns = null
  element

  constructor() {
    this.#roll = new Roll("Rows", "tbody")
    this.head = element("tr")
    const table = element("table", {}, element("thead", {}, this.head), this.#roll.list)
    this.#roll.scroller.append(table)
    this.element = this.#roll.scroller
  }

  add(row) {
    if (!this.#columns) {
      this.#columns = Object.keys(row).filter((name) => !["description", "created"].includes(name))
      this.head.append(...this.#columns.map((name) => element("th", { scope: "col" }, name)))
    }
    this.#roll.add(() => {
      const cells = this.#columns.map((name) => element("td", { "data-column": name }, plain(row[name])))
      return element("tr", { title: plain(row.description) || null }, ...cells)
    })
  }

  settle() {
    this.#roll.flush()
  }
}

export class Notes {
  #list = element("ol", { class: "notes" })
  element = element("div", { class: "roll", tabindex: "0", role: "group", "aria-label": "Notes" }, this.#list)

  /** Newest first. An object's title and text are highlighted; its other members follow. */
  add(kind, data) {
    const { title, text, message, ...rest } = data && typeof data === "object" && !Array.isArray(data) ? data : { text: data }
    const said = [title, text ?? message].filter((part) => part !== undefined).map(plain)
    const more = Object.keys(rest).length ? plain(rest) : ""
    const note = element("li", { "data-kind": kind }, element("time", {}, clock()), element("b", {}, kind))
    if (said.length > 1) note.append(element("strong", {}, said.shift()))
    if (said.length) note.append(element("span", {}, said[0]))
    if (more) note.append(element("small", {}, more))
    this.#list.prepend(note)
    if (this.#list.childElementCount > MOST_ITEMS) this.#list.lastElementChild.remove()
  }
}

export class Facts {
  #values = new Map()
  element = element("dl", { class: "facts" })

  /** @param {Record<string, unknown>} facts */
  set(facts) {
    for (const [name, value] of Object.entries(facts)) {
      if (!this.#values.has(name)) {
        this.#values.set(name, element("dd"))
        this.element.append(element("dt", {}, name.replaceAll("_", " ")), this.#values.get(name))
      }
      const place = this.#values.get(name)
      if (value instanceof FileLink) place.replaceChildren(value.element)
      else setText(place, flat(value))
    }
  }
}

/** A link to a file of the service. A class, so that no stream's data can be taken for one. */
export class FileLink {
  constructor(name) {
    this.element = element("a", { href: `download/${encodeURIComponent(name)}`, download: true }, plain(name))
  }
}

/** `{open: 4, done: 1}` is "open 4, done 1", and `{1: 4}` is "1: 4". */
function flat(value) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return plain(value)
  return Object.entries(value)
    .map(([name, part]) => `${name.replaceAll("_", " ")}${/^\d+$/.test(name) ? ":" : ""} ${plain(part)}`)
    .join(", ")
}

export class Figure {
  #value = element("output", { class: "figure" })
  element = this.#value

  set(text) {
    setText(this.#value, plain(text))
  }
}

export class Sources {
  element = element("ul", { class: "sources", "aria-label": "Sources" })

  set(sources) {
    this.element.replaceChildren(...sources.map((source) => element("li", {}, sourceName(source))))
  }
}

function sourceName(source) {
  if (source === null || typeof source !== "object") return plain(source)
  const { id, title, ...rest } = source
  return title === undefined ? plain(source) : `${id === undefined ? "" : `#${id} `}${plain(title)}${rest.status ? ` · ${plain(rest.status)}` : ""}`
}
