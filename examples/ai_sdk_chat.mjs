// Asks the agent a question with Vercel's AI SDK in a terminal; prints its thoughts, tools and answer as they arrive.
//
//     make run
//     npm install ai zod && curl -O localhost:8000/static/resuming-fetch.js
//     node ai_sdk_chat.mjs "how many tasks are overdue?"
//
// Restart the network in the middle: the answer continues. In a page, pass the same transport to `useChat`.
import { DefaultChatTransport, readUIMessageStream } from "ai"
import { resumingFetch } from "./resuming-fetch.js"

const url = process.env.SSEAPP_URL ?? "http://localhost:8000"
const headers = process.env.SSEAPP_TOKEN ? { authorization: `Bearer ${process.env.SSEAPP_TOKEN}` } : {}
const transport = new DefaultChatTransport({ api: `${url}/ai/chat`, headers, fetch: resumingFetch })

const text = process.argv[2] ?? "what can you do?"
const messages = [{ id: "1", role: "user", parts: [{ type: "text", text }] }]
const stream = await transport
  .sendMessages({ chatId: crypto.randomUUID(), trigger: "submit-message", messages })
  .catch((error) => {
    const unreachable = error instanceof TypeError // `fetch` got no answer
    console.error(unreachable ? `can't reach ${url}: start the service (make run), or set SSEAPP_URL` : error.message)
    process.exit(1)
  })

const printed = new Map() // printed length of each part
const print = (key, text) => {
  process.stdout.write(text.slice(printed.get(key) ?? 0))
  printed.set(key, text.length)
}
const onError = (error) => {
  console.error(error.message)
  process.exitCode = 1
}
for await (const { parts } of readUIMessageStream({ stream, onError })) {
  parts.forEach((part, key) => {
    if (part.type === "text") print(key, part.text)
    if (part.type === "reasoning" && part.state === "done") print(key, `(${part.text})\n`)
    if (part.state === "output-available") print(key, `[${part.type.slice(5)}: ${JSON.stringify(part.output)}]\n`)
  })
}
console.log()
