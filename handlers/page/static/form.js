/** The form that starts a stream: subject, stream, fields, and the service's errors. */

import { GROUPS } from "./catalog.js"
import { element, onEnter, setText } from "./dom.js"
import { Problem } from "./service.js"
import { save, start } from "./start.js"

const LIVES = {
  run: "Continues without its connection",
  fleeting: "Ends with its connection",
  view: "Reads an existing run",
  topic: "Open until you close it",
  link: "A file",
}

export class StartForm {
  #inputs = new Map()
  #stream = null
  #bare = false

  /** @param {(target: import("./view.js").Target, values: object) => Promise<void>} onStart rejected with a `Problem` */
  constructor(place, onStart) {
    this.onStart = onStart
    this.subjects = choices("subject", "Subject", GROUPS, (group) => this.#choose(group))
    this.streams = element("div", { class: "streams" })
    this.says = element("p", { class: "says" })
    this.route = element("code")
    this.life = element("span")
    this.fields = element("div", { class: "fields" })
    this.error = element("p", { class: "error", role: "alert" })
    this.button = element("button", { type: "submit", class: "primary" }, "Start")
    const head = element("div", { class: "chosen" }, this.says, element("p", { class: "route" }, this.route, this.life))
    this.form = element("form", { novalidate: true, autocomplete: "off" })
    this.offered = element("div", { class: "offer", role: "status", hidden: true })
    this.form.append(this.subjects, this.streams, head, this.offered, this.fields, this.error, this.button)
    this.form.addEventListener("submit", (event) => {
      event.preventDefault()
      this.#submit()
    })
    place.append(this.form)
    this.#choose(GROUPS[0])
  }

  #choose(group) {
    this.streams.replaceChildren(choices("stream", `Streams of ${group.name}`, group.streams, (stream) => this.#show(stream)))
    this.#show(group.streams[0])
  }

  #show(stream) {
    this.#stream = stream
    setText(this.says, stream.says)
    setText(this.route, stream.route)
    setText(this.life, LIVES[stream.life])
    setText(this.error, "")
    setText(this.button, stream.life === "link" ? "Download" : "Start")
    this.#inputs.clear()
    this.fields.replaceChildren(...stream.fields.map((field) => this.#field(field)))
  }

  #field(field) {
    const { name, label, kind = "text", lines = false, options, step } = field
    const value = (this.#bare && field.bare) || (field.value ?? "")
    const sends = kind === "area" && !lines
    const hint = field.hint ?? (sends ? "Enter sends, Shift+Enter starts a new line." : "")
    const id = `field-${name}`
    const about = `${id}-about`
    const common = { id, name, "aria-describedby": about }
    let input
    if (kind === "select") {
      const items = options.map((option) => element("option", { value: option }, option || "any"))
      input = element("select", common, ...items)
    } else if (kind === "area") {
      input = element("textarea", { ...common, rows: lines ? "6" : "2", class: lines ? "lines" : null })
      input.value = value
    } else {
      input = element("input", { ...common, type: kind, step: kind === "number" ? step : null })
      if (kind === "file") input.accept = ".csv,text/csv"
      else input.value = value
    }
    if (kind === "area") onEnter(input, sends, () => this.form.requestSubmit())
    const said = element("p", { id: about, class: "hint" }, hint)
    this.#inputs.set(name, { input, said, hint })
    const box = element("div", { class: "field", "data-kind": kind }, element("label", { for: id }, label), input, said)
    return box
  }

  /** Offer an action; null removes the offer. */
  offer(text, label, act) {
    this.offered.replaceChildren(
      ...(text ? [element("p", {}, text), element("button", { type: "button", onclick: act }, label)] : []),
    )
    this.offered.hidden = !text
  }

  /** Whether there are no tasks. A question that the user has changed stays. */
  set bare(bare) {
    this.#bare = bare
    for (const { name, value, bare: other } of this.#stream.fields) {
      const { input } = this.#inputs.get(name)
      if (other && [value, other].includes(input.value)) input.value = bare ? other : value
    }
  }

  #values() {
    const values = {}
    for (const [name, { input }] of this.#inputs) {
      if (input.type === "file") {
        if (input.files.length) values[name] = input.files[0]
      } else if (input.type === "number") {
        if (input.value !== "") values[name] = Number(input.value)
      } else if (input.value !== "") values[name] = input.value
    }
    return values
  }

  async #submit() {
    if (this.button.ariaBusy === "true") return
    this.button.ariaBusy = "true" // `disabled` would remove the focus
    this.clear()
    try {
      const values = this.#values()
      if (this.#stream.life === "link") await save(this.#stream, values)
      else await this.onStart(await start(this.#stream, values), values)
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem
      this.#blame(problem)
    } finally {
      this.button.ariaBusy = "false"
    }
  }

  /** Remove errors. */
  clear() {
    setText(this.error, "")
    for (const { input, said, hint } of this.#inputs.values()) {
      input.removeAttribute("aria-invalid")
      said.className = "hint"
      setText(said, hint)
    }
  }

  /** Show the problem at its field (`[0].content` at `content`), or at the end of the form. */
  #blame({ message, field }) {
    const names = (field ?? "").match(/[A-Za-z_]\w*/g) ?? []
    const found = this.#inputs.get(names.findLast((name) => this.#inputs.has(name)))
    if (!found) {
      setText(this.error, message)
      return
    }
    found.input.setAttribute("aria-invalid", "true")
    found.said.className = "hint error"
    setText(found.said, message)
    found.input.focus()
  }
}

/** Radio buttons, which arrow keys move through. */
function choices(name, legend, items, onChoose) {
  const set = element("fieldset", { class: name }, element("legend", { class: "unseen" }, legend))
  items.forEach((item, at) => {
    const input = element("input", { type: "radio", name, value: item.id ?? item.name })
    input.checked = at === 0
    input.addEventListener("change", () => onChoose(item))
    set.append(element("label", {}, input, element("span", {}, item.name)))
  })
  return set
}
