/**
 * The streams that can be started, by subject, each with the fields of its form.
 *
 * A field goes into the path if that has its name in braces, into the body if the stream has a `body`, else into the
 * query. An empty field is left out. The service validates the fields, not the page.
 */

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {string} label
 * @property {"text" | "number" | "select" | "area" | "file"} [kind]
 * @property {string} [value] the initial value
 * @property {string} [bare] the initial value while the database has no tasks
 * @property {boolean} [lines] several lines: Enter starts a new line instead of submitting
 * @property {string} [hint]
 * @property {string[]} [options]
 * @property {string} [step]
 *
 * @typedef {object} Stream
 * @property {string} id
 * @property {string} name
 * @property {string} route as in GET /runs
 * @property {"run" | "fleeting" | "view" | "topic" | "link"} life run: it continues without its connection. fleeting:
 *   it ends with its connection. view: reads an existing run. topic: others publish to it. link: a file.
 * @property {string} says
 * @property {Field[]} fields
 * @property {(values: Record<string, any>, turns: {said: string, answer: string}[]) => any} [body] the JSON to send; a
 *   Blob is sent unchanged. `turns`: the conversation so far
 * @property {string} [talks] of a conversation: the field with the next message
 * @property {string} [mediaType] of a Blob
 */

import { newKey } from "./service.js"

const number = (name, label, value, more = {}) => ({ name, label, value, kind: "number", step: "any", ...more })
const PACE = number("interval", "Seconds between events", "0.4")
const STATUS = { name: "status", label: "Status", kind: "select", options: ["", "open", "doing", "done"] }
const QUERY = {
  name: "query", label: "Question", kind: "area",
  value: "What is the date, and which open tasks have priority 5?", bare: "What is the date, and how much is 365 * 24?",
}
/** The service accepts a hundred messages. */
const MOST_TURNS = 20

const SAMPLE = `title,description,status,priority,due
Renew the certificate,The one of the mail server,open,5,2026-12-01
Write the release notes,What changed since spring,doing,3,2026-12-10
Call the printer,The proofs are too dark,open,4,
Order new chairs,For the small room,open,2,2027-01-15
Archive last year's invoices,,done,1,
Test the backup,Restore one machine from it,open,5,2026-11-30
`

/** The page offers to import the sample if there are no tasks. */
export const IMPORT = {
  id: "import", name: "Import a CSV", route: "POST /tasks/import", life: "run",
  says: "Imports rows into the tasks database, a hundred at a time, and reports invalid rows.",
  fields: [
    { name: "file", label: "File", kind: "file", hint: "Or the rows below." },
    { name: "csv", label: "Rows", kind: "area", lines: true, value: SAMPLE },
  ],
  body: ({ file, csv = "" }) => file ?? new Blob([csv]),
  mediaType: "text/csv",
}

/** @type {{name: string, streams: Stream[]}[]} */
export const GROUPS = [
  {
    name: "Agent",
    streams: [
      {
        id: "agent", name: "Steps and answer", route: "GET /agent/stream", life: "run", fields: [QUERY],
        says: "Plans, calls tools, and writes an answer from their results.",
      },
      {
        id: "think", name: "Thoughts", route: "GET /agent/think/stream", life: "run", fields: [QUERY],
        says: "The same agent, with its plan step by step.",
      },
      {
        id: "tools", name: "Tool calls", route: "POST /agent/process/stream", life: "run", fields: [QUERY],
        says: "The same agent, with each tool call and its result.",
      },
      {
        id: "session", name: "Conversation", route: "POST /api/chat", life: "run", talks: "message",
        says: "Cites its sources. The service stores the conversation of a session.",
        fields: [
          { name: "message", label: "Message", kind: "area", value: "How many tasks are there by status?", bare: "How much is 365 * 24?" },
          { name: "session_id", label: "Session", value: newKey(), hint: "Use the same session to continue its conversation." },
        ],
        body: (values) => values,
      },
    ],
  },
  {
    name: "Chat",
    streams: [
      {
        id: "chat", name: "One prompt", route: "GET /chat", life: "run",
        says: "A language model's answer, token by token; a mock if no model is configured.",
        fields: [{ name: "prompt", label: "Prompt", kind: "area", value: "Tell me about server-sent events" }],
      },
      {
        id: "messages", name: "Conversation", route: "POST /chat/stream", life: "run", talks: "content",
        says: "The same model, with an instruction. Each turn sends the whole conversation.",
        fields: [
          { name: "system", label: "Instruction", value: "Answer in one sentence." },
          { name: "content", label: "Message", kind: "area", value: "What is backpressure?" },
        ],
        body: ({ system, content = "" }, turns) => [
          ...(system ? [{ role: "system", content: system }] : []),
          ...turns.slice(-MOST_TURNS).flatMap(({ said, answer }) => [
            { role: "user", content: said },
            { role: "assistant", content: answer },
          ]),
          { role: "user", content },
        ],
      },
    ],
  },
  {
    name: "Tasks",
    streams: [
      IMPORT,
      {
        id: "tasks", name: "List", route: "GET /tasks/stream", life: "fleeting",
        says: "Rows of the tasks database.",
        fields: [STATUS, { name: "q", label: "Search" }, number("limit", "At most", "100")],
      },
      {
        id: "execute", name: "Work on a task", route: "POST /tasks/execute/stream", life: "run",
        says: "analyze: figures about its text; summarize: a summary by the model; finish: marks it as done.",
        fields: [
          number("task_id", "Task", "1"),
          { name: "operation", label: "Operation", kind: "select", options: ["analyze", "summarize", "finish"] },
        ],
        body: (values) => values,
      },
      {
        id: "execution", name: "Follow a task", route: "GET /tasks/{task_id}/progress/stream", life: "view",
        says: "The newest work on a task, live or finished.",
        fields: [number("task_id", "Task", "1")],
      },
      {
        id: "export", name: "Export as CSV", route: "GET /export.csv", life: "link",
        says: "All tasks, as a file.",
        fields: [STATUS],
      },
    ],
  },
  {
    name: "Jobs",
    streams: [
      {
        id: "report", name: "Report with log", route: "GET /api/process/stream", life: "run", fields: [],
        says: "Figures about the tasks, made in a worker thread, with steps and log lines.",
      },
      {
        id: "job", name: "Job", route: "POST /jobs", life: "run",
        says: "Runs in the background. digest: the SHA-256 of all files; report: figures in a file; sleep: a demonstration, at most 10 minutes.",
        fields: [
          { name: "kind", label: "Kind", kind: "select", options: ["sleep", "report", "digest"] },
          number("steps", "Steps (sleep)", "20"),
          number("interval", "Seconds per step (sleep)", "0.5"),
        ],
        body: ({ kind, steps, interval }) => (kind === "sleep" ? { kind, input: { steps, interval } } : { kind }),
      },
      {
        id: "items", name: "Items", route: "POST /process", life: "run",
        says: "The SHA-256 and length of each item.",
        fields: [{ name: "items", label: "Items", kind: "area", lines: true, value: "one\ntwo\nthree", hint: "One item a line, or a JSON list." }],
        body: ({ items = "" }) => (items.trim().startsWith("[") ? raw(items) : items.split("\n").filter(Boolean)),
      },
    ],
  },
  {
    name: "Topics",
    streams: [
      {
        id: "topic", name: "Topic", route: "GET /topics/{name}", life: "topic",
        says: "All events published under a name. Publish below the stream, or from another tab.",
        fields: [
          { name: "name", label: "Name", value: "news" },
          { name: "listen", label: "More event names", hint: "Comma-separated. A browser receives only events whose names it listens for.", local: true },
        ],
      },
      {
        id: "user", name: "Notifications", route: "GET /users/{user_id}/stream", life: "topic",
        says: "Notifications and messages for one user, and a heartbeat every five seconds.",
        fields: [{ name: "user_id", label: "User", value: "ann" }],
      },
    ],
  },
  {
    name: "Files",
    streams: [
      {
        id: "download", name: "Download", route: "GET /download/{filename}", life: "link",
        says: "A file of the files folder, such as a job's report.",
        fields: [{ name: "filename", label: "File name" }],
      },
    ],
  },
  {
    name: "Basics",
    streams: [
      basic("stream", "Counter", "GET /stream", "Named events; the last one is complete.", number("count", "Events", "10", { step: "1" })),
      basic("data", "Counter, data only", "GET /stream/data", "The same without event names; the last one is [DONE].", number("count", "Events", "10", { step: "1" })),
      basic("hello", "Hello", "GET /stream/hello", "Four words."),
      basic("progress", "Progress", "GET /stream/progress", "From 0 to 100 in steps of ten."),
      basic("format", "Format", "GET /stream/format", "The four forms of an event."),
      basic("merge", "Merge", "GET /stream/merge", "Two sources with different intervals."),
      {
        ...basic("errors", "Errors", "GET /stream/errors", "Items that can't be encoded, and a source that fails."),
        fields: [number("total", "Items", "40"), number("at", "Fails at", "25"), number("interval", "Seconds between events", "0.05")],
      },
      {
        ...basic("timeout", "Time limit", "GET /stream/timeout", "Counts until a time limit."),
        fields: [number("limit", "Seconds", "5"), number("interval", "Seconds between events", "1")],
      },
      {
        ...basic("countdown", "Countdown", "GET /countdown/{seconds}", "Counts down to zero."),
        fields: [number("seconds", "From", "10"), number("interval", "Seconds between events", "1")],
      },
      basic("steps", "Three steps", "GET /process/stream", "Analyzing, Processing, Finalizing."),
    ],
  },
]

function basic(id, name, route, says, ...fields) {
  return { id, name, route, life: "fleeting", says, fields: [...fields, PACE] }
}

/** JSON as typed: the service validates it. */
function raw(text) {
  return new Blob([text])
}
