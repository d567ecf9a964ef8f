/**
 * Code to read the same stream without this page: a shell command, and a script.
 *
 * The values come from users and streams, so they are quoted for the shell and for JavaScript.
 */

/** `EventSource` fires these itself. */
const OWN_NAMES = ["error", "open"]

/**
 * @typedef {object} Asked the request that started a stream
 * @property {string} method
 * @property {string} url relative to the page
 * @property {string} [body] if it is short
 * @property {string} [mediaType]
 * @property {boolean} [keyed] it starts a run
 */

/**
 * @param {Asked} asked
 * @param {boolean} signedIn the service requires a token
 */
export function curlOf(asked, signedIn) {
  const { method, mediaType } = asked
  const parts = ["curl -N"]
  if (method !== "GET" && asked.body === undefined && !mediaType) parts.push(`-X ${method}`)
  if (signedIn) parts.push(`-H "authorization: Bearer $TOKEN"`)
  if (mediaType) parts.push(`-H ${shell(`content-type: ${mediaType}`)}`)
  if (mediaType) parts.push(isShort(asked) ? `--data-raw ${shell(asked.body)}` : `--data-binary @${fileOf(asked)}`)
  return [...parts, shell(absolute(asked.url))].join(" ")
}

/**
 * @param {Asked} asked
 * @param {string[]} names of the events to listen for
 */
export function scriptOf(asked, names) {
  const { method, url, mediaType } = asked
  const lines = []
  if (method === "GET") lines.push(`const source = new EventSource(${addressOf(asked)})`)
  else {
    const headers = { prefer: "respond-async", ...(mediaType ? { "content-type": mediaType } : {}) }
    const body = isShort(asked) ? JSON.stringify(asked.body) : "file"
    lines.push(
      `const answer = await fetch(${JSON.stringify(absolute(url))}, {`,
      `  method: ${JSON.stringify(method)},`,
      `  headers: { ...${JSON.stringify(headers)}, "idempotency-key": crypto.randomUUID() },`,
      ...(mediaType ? [`  body: ${body},`] : []),
      `})`,
      `const source = new EventSource(new URL(answer.headers.get("location"), answer.url))`,
    )
  }
  const heard = names.filter((name) => !OWN_NAMES.includes(name))
  lines.push(
    `for (const name of ${JSON.stringify(heard.length ? heard : ["message"])}) {`,
    `  source.addEventListener(name, (event) => console.log(name, event.data))`,
    `}`,
  )
  return lines.join("\n")
}

/** All connections of a run use one key; another page needs its own. */
function addressOf({ url, keyed }) {
  const address = absolute(url)
  if (!keyed) return JSON.stringify(address)
  return `${JSON.stringify(`${address}${address.includes("?") ? "&" : "?"}key=`)} + crypto.randomUUID()`
}

const absolute = (url) => new URL(url, document.baseURI).href
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`
/** A longer body was not kept: the code reads it from a file. */
const isShort = ({ body }) => body !== undefined
const fileOf = ({ mediaType }) => (mediaType === "text/csv" ? "tasks.csv" : "body.json")
