// A conversation with the agent over AG-UI in a terminal, with the AG-UI client: one question a line.
//
//     make run
//     npm install @ag-ui/client && curl -O localhost:8000/static/resuming-fetch.js
//     node ag_ui_chat.mjs
//
// Restart the network in the middle: the answer continues. CopilotKit's `<CopilotChat>` takes the same agent.
import { createInterface } from "node:readline"
import { HttpAgent } from "@ag-ui/client"
import { resumingFetch } from "./resuming-fetch.js"

const url = process.env.SSEAPP_URL ?? "http://localhost:8000"
const headers = process.env.SSEAPP_TOKEN ? { authorization: `Bearer ${process.env.SSEAPP_TOKEN}` } : {}
const agent = new HttpAgent({ url: `${url}/ag-ui`, headers, fetch: resumingFetch, threadId: crypto.randomUUID() })

const shown = {
  onToolCallEndEvent: ({ toolCallName, toolCallArgs }) => console.log(`[${toolCallName} ${JSON.stringify(toolCallArgs)}]`),
  onTextMessageContentEvent: ({ event }) => void process.stdout.write(event.delta),
  onRunErrorEvent: ({ event }) => console.error(event.message),
  onRunFailed: ({ error }) => {
    const unreachable = error instanceof TypeError // `fetch` got no answer
    console.error(unreachable ? `can't reach ${url}: start the service (make run), or set SSEAPP_URL` : error.message)
    process.exitCode = 1
    return { stopPropagation: true } // else `HttpAgent` logs a stack trace
  },
}
for await (const question of createInterface({ input: process.stdin })) {
  agent.addMessage({ id: crypto.randomUUID(), role: "user", content: question })
  await agent.runAgent({ runId: crypto.randomUUID() }, shown) // if it fails, ask again
  console.log()
}
