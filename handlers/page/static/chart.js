/** Events per second over the last minute, as bars. */

import { drawing, element, setText } from "./dom.js"

const SECONDS = 60
const HEIGHT = 28
const STEP = 3

export class Chart {
  #counts = new Array(SECONDS).fill(0)
  #now = 0
  #bars = this.#counts.map((_, at) => drawing("rect", { x: at * STEP, width: STEP - 1, y: HEIGHT - 1, height: 1 }))
  #figure = element("b", {}, "0")
  #svg = drawing("svg", { viewBox: `0 0 ${SECONDS * STEP} ${HEIGHT}`, role: "img" }, ...this.#bars)

  constructor(place) {
    place.append(element("p", {}, this.#figure, " events per second"), this.#svg)
    this.#draw()
    setInterval(() => this.#tick(), 1000)
  }

  count() {
    this.#now++
  }

  #tick() {
    this.#counts.push(this.#now)
    this.#counts.shift()
    this.#now = 0
    if (!document.hidden) this.#draw()
  }

  #draw() {
    const most = Math.max(...this.#counts)
    const top = Math.max(most, 5)
    this.#bars.forEach((bar, at) => {
      const height = Math.max(1, Math.round((HEIGHT * this.#counts[at]) / top))
      bar.setAttribute("height", height)
      bar.setAttribute("y", HEIGHT - height)
      bar.classList.toggle("some", this.#counts[at] > 0)
    })
    const now = this.#counts.at(-1)
    setText(this.#figure, now.toLocaleString("en"))
    this.#svg.setAttribute("aria-label", `Events per second: now ${now}, at most ${most} in the last minute`)
  }
}
