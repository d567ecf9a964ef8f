/**
 * Starts a stream from a form's values.
 *
 * The `EventSource` itself sends a GET, with a key so that all its reconnections belong to one run. A POST is sent with
 * `Prefer: respond-async`, and then its run is read.
 */

import { call, newKey } from "./service.js"

/** In bytes, of a body that is kept for the code example. */
const MOST_SHOWN = 2000

/**
 * @param {import("./catalog.js").Stream} stream
 * @param {Record<string, any>} values the fields that are not empty
 * @param {{said: string, answer: string}[]} [turns] the conversation so far
 * @returns {Promise<import("./view.js").Target>} rejected with a `Problem`
 */
export async function start(stream, values, turns = []) {
  const { route, life, name: title } = stream
  const [method] = route.split(" ")
  const address = addressOf(stream, values)
  const about = aboutOf(stream, values)
  if (method === "GET") {
    const url = life === "run" ? `${address}${address.includes("?") ? "&" : "?"}key=${newKey()}` : address
    return { title, about, route, life, url, asked: { method, url: address, keyed: life === "run" } }
  }
  const body = stream.body?.(values, turns)
  const headers = { Prefer: "respond-async", "Idempotency-Key": newKey() }
  if (body !== undefined) headers["Content-Type"] = stream.mediaType ?? "application/json"
  const text = body instanceof Blob ? body : JSON.stringify(body)
  const response = await call(address, { method, headers, body: text })
  const said = await response.json()
  const url = new URL(response.headers.get("Location"), response.url).href // relative to the request's URL
  const asked = { method, url: address, mediaType: headers["Content-Type"], body: await shortText(text) }
  const target = { title, about, route, life, url, asked, run: said.run ?? said.job_id }
  if (!stream.talks) return target
  return { ...target, talks: stream.id, values, said: values[stream.talks] }
}

/** The request's body, if it is short enough for the code example. */
async function shortText(body) {
  if (!(body instanceof Blob)) return body?.length > MOST_SHOWN ? undefined : body
  return body instanceof File || body.size > MOST_SHOWN ? undefined : body.text()
}

/** Save a file. A HEAD checks it first, since a link to an error would leave the page. */
export async function save(stream, values) {
  const address = addressOf(stream, values)
  try {
    await call(address, { method: "HEAD" })
  } catch {
    await call(address) // a HEAD has no body with the reason
  }
  const link = document.createElement("a")
  link.href = address
  link.download = ""
  link.click()
}

function addressOf({ route, fields, body }, values) {
  const query = new URLSearchParams()
  let path = route.split(" ")[1].slice(1)
  for (const { name, local } of fields) {
    const value = values[name] ?? ""
    if (path.includes(`{${name}}`)) path = path.replace(`{${name}}`, () => encodeURIComponent(value))
    else if (!body && !local && value !== "") query.set(name, value)
  }
  return query.size ? `${path}?${query}` : path
}

function aboutOf({ fields }, values) {
  const telling = fields.find(({ kind, name }) => !["number"].includes(kind) && name !== "csv" && values[name])
  const value = telling ? values[telling.name] : values.task_id ?? values.seconds ?? ""
  const text = value instanceof File ? value.name : String(value)
  return text.length > 80 ? `${text.slice(0, 79)}…` : text
}
