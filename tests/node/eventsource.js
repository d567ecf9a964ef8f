// npm's eventsource: prints each event as a line of JSON until it has closed for good.
import { EventSource } from "eventsource"

const source = new EventSource(process.argv[2])
const note = (event) => console.log(JSON.stringify([event.lastEventId, event.type, event.data]))
for (const type of ["message", "item", "complete"]) source.addEventListener(type, note)
source.addEventListener("error", () => {
  if (source.readyState === EventSource.CLOSED) process.exit(0)
})
