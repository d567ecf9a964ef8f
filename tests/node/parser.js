// npm's eventsource-parser over fetch: prints each event, and goes on after a cut with the last id until the 204.
import { createParser } from "eventsource-parser"

let last = ""
for (;;) {
  const headers = last ? { "last-event-id": last } : {}
  const response = await fetch(process.argv[2], { headers })
  if (response.status === 204) break
  const parser = createParser({
    onEvent: ({ id, event, data }) => {
      last = id ?? last
      console.log(JSON.stringify([last, event ?? "message", data]))
    },
  })
  const decoder = new TextDecoder()
  try {
    for await (const chunk of response.body) parser.feed(decoder.decode(chunk, { stream: true }))
  } catch (error) {
    if (error.cause?.code !== "UND_ERR_SOCKET") throw error // cut: again
  }
}
