/**
 * Renders the Markdown that our docs use: headings, paragraphs, lists, tables, code, emphasis and links. It parses no
 * HTML, and leaves any other construct as text.
 */

import { element } from "./dom.js"

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|\*(\S.*?)\*|!?\[((?:`[^`]*`|[^\]])*)\]\(([^)\s]+)\)|\\([!-/:-@[-`{-~])/s
const FENCE = /^(```+|~~~+)/
const ITEM = /^(?:[-*]|(\d+)\.) +/
const INDENTED = /^ {2,}\S|^\s*$/

/**
 * @param {string} text
 * @param {(href: string) => string | null} addressOf null: show the text without a link
 * @returns {HTMLElement[]}
 */
export function rendered(text, addressOf) {
  return blocks(text.replaceAll("\r\n", "\n").split("\n"), addressOf)
}

function blocks(lines, addressOf) {
  const made = []
  const say = (words) => inline(words, addressOf)
  let at = 0
  /** The following lines of the same block. */
  const take = (goesOn) => {
    const first = at
    while (at < lines.length && goesOn(lines[at])) at++
    return lines.slice(first, at)
  }
  while (at < lines.length) {
    const line = lines[at]
    const [fence] = FENCE.exec(line) ?? []
    const [, marks, heading] = /^(#{1,6}) +(.*)$/.exec(line) ?? []
    if (!line.trim()) at++
    else if (fence) {
      at++
      made.push(code(take((next) => !next.startsWith(fence))))
      at++
    } else if (marks) {
      at++
      made.push(element(`h${marks.length}`, { id: slug(heading) }, ...say(heading)))
    } else if (line.startsWith("    ")) {
      made.push(code(take((next) => next.startsWith("    ") || !next.trim()).map((next) => next.slice(4))))
    } else if (line.startsWith("|")) {
      made.push(table(take((next) => next.startsWith("|")), say))
    } else if (ITEM.test(line)) {
      const ordered = ITEM.exec(line)[1] !== undefined
      const items = []
      while (at < lines.length && ITEM.test(lines[at])) {
        const [mark] = ITEM.exec(lines[at])
        const first = lines[at++].slice(mark.length)
        const rest = take((next) => INDENTED.test(next))
        items.push(element("li", {}, ...blocks([first, ...rest.map((next) => next.slice(mark.length))], addressOf)))
      }
      made.push(element(ordered ? "ol" : "ul", {}, ...items))
    } else {
      const goesOn = (next) => next.trim() && !FENCE.test(next) && !/^(#{1,6} |\|)/.test(next) && !ITEM.test(next)
      made.push(element("p", {}, ...say([lines[at++], ...take(goesOn)].join("\n"))))
    }
  }
  return made
}

function code(lines) {
  return element("pre", { tabindex: "0" }, element("code", {}, lines.join("\n").trimEnd()))
}

function table([head, , ...rows], say) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"))
  const line = (tag, row) => element("tr", {}, ...cells(row).map((cell) => element(tag, {}, ...say(cell))))
  const whole = element("table", {}, element("thead", {}, line("th", head)), element("tbody", {}, ...rows.map((row) => line("td", row))))
  return element("div", { class: "roll", tabindex: "0" }, whole)
}

/** @returns {(Node | string)[]} */
function inline(text, addressOf) {
  const made = []
  while (text) {
    const found = INLINE.exec(text)
    if (!found) break
    const [whole, , literal, strong, emphasis, label, href, escaped] = found
    made.push(text.slice(0, found.index))
    if (literal !== undefined) made.push(element("code", {}, literal.replace(/^ (.+) $/s, "$1")))
    else if (strong !== undefined) made.push(element("strong", {}, ...inline(strong, addressOf)))
    else if (emphasis !== undefined) made.push(element("em", {}, ...inline(emphasis, addressOf)))
    else if (href !== undefined) {
      const address = addressOf(href)
      const words = inline(label, addressOf)
      made.push(...(address === null ? words : [element("a", { href: address }, ...words)]))
    } else made.push(escaped)
    text = text.slice(found.index + whole.length)
  }
  return [...made, text]
}

/** The anchor that GitHub gives a heading. */
function slug(heading) {
  return heading.toLowerCase().replace(/[^\p{L}\p{N}\s_-]/gu, "").replaceAll(" ", "-")
}
