// node reading.js CLIENT URL: prints the id and the data of each message, to `[DONE]`.
const [client, url] = process.argv.slice(2)
const note = ({ id, lastEventId, data }) => {
  console.log(JSON.stringify([id ?? lastEventId, data]))
  if (data === "[DONE]") process.exit(0)
}

const CLIENTS = {
  async "@microsoft/fetch-event-source"() {
    globalThis.window = globalThis
    globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} }
    const { fetchEventSource } = await import("@microsoft/fetch-event-source/lib/cjs/index.js")
    const wait = () => undefined // until it asks again: as the server says
    await fetchEventSource(url, { openWhenHidden: true, onmessage: note, onerror: wait })
  },
  async "event-source-polyfill"() {
    // It waits a second before it asks again, whatever the server says: here a second is a twentieth.
    const { setTimeout } = globalThis
    globalThis.setTimeout = (work, ms, ...given) => setTimeout(work, ms / 20, ...given)
    globalThis.window = globalThis
    const { default: polyfill } = await import("event-source-polyfill")
    new polyfill.EventSourcePolyfill(url).onmessage = note
  },
  async eventsource() {
    const { EventSource } = await import("eventsource")
    new EventSource(url).onmessage = note
  },
  async "eventsource-client"() {
    const { createEventSource } = await import("eventsource-client")
    createEventSource({ url, onMessage: note })
  },
  async eventsource2() {
    const { default: EventSource } = await import("eventsource2")
    new EventSource(url).onmessage = note
  },
}
await CLIENTS[client]()
