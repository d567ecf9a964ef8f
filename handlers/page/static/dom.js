/** Makes elements without parsing HTML, so that a stream's data stays text. */

const SVG = "http://www.w3.org/2000/svg"

/**
 * An element. `on…` attributes are listeners; false and null omit an attribute.
 * @param {string} tag
 * @param {Record<string, unknown>} [attributes]
 * @param {...(Node | string | null)} children
 * @returns {HTMLElement}
 */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children)
}

/** The same for SVG. */
export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children)
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value)
    else if (value === true) node.setAttribute(name, "")
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value))
  }
  node.append(...children.filter((child) => child !== null && child !== undefined))
  return node
}

/** Set a text only if it differs: an unchanged node costs no layout. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text
}

/**
 * Call `act` on Ctrl+Enter or Cmd+Enter, and with `sends` on Enter. Ignores the Enter that ends an IME composition
 * (Japanese, Chinese, Korean); in Safari only `keyCode` 229 shows that.
 */
export function onEnter(input, sends, act) {
  if (sends) input.setAttribute("enterkeyhint", "send")
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing || event.keyCode === 229) return
    if (event.shiftKey || event.altKey || !(sends || event.ctrlKey || event.metaKey)) return
    event.preventDefault()
    act()
  })
}

/** @param {Date | string | number} [time] */
export function clock(time = new Date()) {
  const date = new Date(time)
  return Number.isNaN(date.getTime()) ? "" : date.toLocaleTimeString("en-GB")
}

/** A value as one line of text. */
export function plain(value) {
  if (value === null || value === undefined) return ""
  return typeof value === "string" ? value : JSON.stringify(value)
}
