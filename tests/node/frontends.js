// node frontends.js CLIENT '{"url": …, …}': what a front end's own package makes of our streams, as lines of JSON.
// Each line is [what, value]: each "chunk" as the package hands it on, and what is there at the end.
import { resumingFetch } from "../../handlers/page/static/resuming-fetch.js"

const [client, given] = process.argv.slice(2)
const asked = JSON.parse(given)
const tell = (what, value) => console.log(JSON.stringify([what, value ?? null]))
const fetch = asked.resuming ? resumingFetch : globalThis.fetch
console.error = () => {} // `WorkflowChatTransport` writes each cut there

/** AI SDK: the chunks, and the message that `readUIMessageStream` makes of them. */
const readChunks = async (stream) => {
  if (stream === null) return tell("nothing")
  const { readUIMessageStream } = await import("ai")
  const [chunks, forMessage] = stream.tee()
  const reading = (async () => {
    let message
    const onError = (error) => tell("error", error.message)
    for await (message of readUIMessageStream({ stream: forMessage, onError })) continue
    return message
  })()
  for await (const chunk of chunks) tell("chunk", chunk)
  tell("message", await reading)
}

const chat = async (transport) => {
  const { chatId, text, reconnect } = asked
  const messages = [{ id: "1", role: "user", parts: [{ type: "text", text }] }]
  await readChunks(
    await (reconnect
      ? transport.reconnectToStream({ chatId, startIndex: asked.startIndex })
      : transport.sendMessages({ chatId, messages, trigger: "submit-message" })),
  )
}

const CLIENTS = {
  async ai() {
    const { DefaultChatTransport } = await import("ai")
    await chat(new DefaultChatTransport({ api: asked.url, fetch, headers: asked.headers }))
  },

  async workflow() {
    const { WorkflowChatTransport } = await import("@ai-sdk/workflow/client")
    const onChatSendMessage = (response) => tell("run", response.headers.get("x-workflow-run-id"))
    await chat(new WorkflowChatTransport({ api: asked.url, fetch, onChatSendMessage }))
  },

  async "ag-ui"() {
    const { HttpAgent } = await import("@ag-ui/client")
    const { threadId, runId, text } = asked
    const agent = new HttpAgent({ url: asked.url, fetch, threadId })
    agent.addMessage({ id: "1", role: "user", content: text })
    const onRunFinishedEvent = ({ outcome }) => tell("outcome", outcome)
    const onRunErrorEvent = ({ event }) => tell("error", event.message)
    const onEvent = ({ event }) => tell("chunk", event)
    await agent.runAgent({ runId }, { onEvent, onRunFinishedEvent, onRunErrorEvent }).catch((e) => tell("threw", e.message))
    tell("messages", agent.messages)
  },

  async tanstack() {
    const { fetchServerSentEvents } = await import("@tanstack/ai-client")
    const { threadId, runId, text } = asked
    const connection = fetchServerSentEvents(asked.url, { fetchClient: fetch, reconnect: { delayMs: 5 } })
    if (asked.hydrate) return tell("thread", await connection.hydrate(threadId))
    const messages = [{ id: "1", role: "user", parts: [{ type: "text", content: text }] }]
    const stream = asked.join ? connection.joinRun(runId) : connection.connect(messages, {}, undefined, { threadId, runId })
    for await (const chunk of stream) tell("chunk", chunk)
  },

  async openai() {
    const { default: OpenAI } = await import("openai")
    const openai = new OpenAI({ apiKey: asked.key ?? "none", baseURL: asked.url, fetch, maxRetries: asked.maxRetries ?? 0 })
    const messages = [{ role: "user", content: asked.text }]
    try {
      if (asked.models) {
        for await (const model of openai.models.list()) tell("model", model.id)
      } else if (asked.cancel) {
        tell("final", await openai.responses.cancel(asked.cancel))
      } else if (asked.responses) {
        const { starting_after, response_id } = asked
        const events = response_id
          ? await openai.responses.retrieve(response_id, { stream: true, starting_after })
          : openai.responses.stream({ model: asked.model, input: asked.text, background: true })
        for await (const event of events) tell("chunk", event)
        if (!response_id) tell("final", await events.finalResponse())
      } else if (asked.whole) {
        tell("final", await openai.chat.completions.create({ model: asked.model, messages }))
      } else {
        const events = openai.chat.completions.stream({ model: asked.model, messages })
        for await (const chunk of events) tell("chunk", chunk)
        tell("final", await events.finalChatCompletion())
      }
    } catch (error) {
      tell("threw", `${error.status ?? ""} ${error.code ?? ""} ${error.message}`)
      tell("refused", error.constructor.name)
    }
  },
}
await CLIENTS[client]()
