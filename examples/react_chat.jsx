// A chat page with React and the AI SDK's `useChat`. An answer survives a cut and a reload; a button stops it.
//
//     SSEAPP_CORS_ORIGINS=http://localhost:8001 make run
//     npm install react react-dom @ai-sdk/react ai esbuild
//     curl -O localhost:8000/static/resuming-fetch.js
//     npx esbuild react_chat.jsx --bundle --jsx=automatic --outdir=. --servedir=. --serve=8001
//
// Then open http://localhost:8001/react_chat.html.
import { useChat } from "@ai-sdk/react"
import { DefaultChatTransport } from "ai"
import { useEffect } from "react"
import { createRoot } from "react-dom/client"
import { resumingFetch } from "./resuming-fetch.js"

const service = new URLSearchParams(location.search).get("service") ?? "http://localhost:8000"
const transport = new DefaultChatTransport({ api: `${service}/ai/chat`, fetch: resumingFetch })
// In the page's address, so that a reload has it. It must be random: whoever knows it can read the answer.
location.hash ||= crypto.randomUUID()
const id = location.hash.slice(1)
const stored = JSON.parse(sessionStorage.getItem(id) ?? "[]")

function Chat() {
  const { messages, sendMessage, status, error } = useChat({ id, messages: stored, transport, resume: true })
  const stop = () => fetch(`${service}/ai/chat/${id}/stop`, { method: "POST" })
  const isBusy = status === "submitted" || status === "streaming"
  // Without the half of an answer: after a reload the service sends all of it again.
  useEffect(() => {
    if (status !== "streaming") sessionStorage.setItem(id, JSON.stringify(messages))
  }, [status])
  return (
    <>
      {messages.map(({ id, role, parts }) => (
        <p key={id} className={role}>
          {parts.map((part) => (part.type === "text" ? part.text : null))}
        </p>
      ))}
      <form action={(form) => sendMessage({ text: form.get("question") })}>
        <input name="question" required />
        <button disabled={isBusy}>Ask</button>
        <button type="button" disabled={!isBusy} onClick={stop}>
          Stop
        </button>
      </form>
      <p role="status">{error ? error.message : status}</p>
    </>
  )
}

createRoot(document.getElementById("root")).render(<Chat />)
