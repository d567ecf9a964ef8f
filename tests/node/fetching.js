// node fetching.js URL: reads a stream by `resumingFetch`, and prints each event as a line of JSON to the body's end.
import { eventSource, resumingFetch } from "../../handlers/page/static/resuming-fetch.js"

const response = await resumingFetch(process.argv[2])
const source = eventSource(response.body)
const note = (event) => console.log(JSON.stringify([event.lastEventId, event.type, event.data]))
for (const type of ["message", "item", "complete"]) source.addEventListener(type, note)
