/**
 * Translates the events of each route into the parts of a view.
 *
 * A vocabulary has a function `(show, data)` for each event name; on data-only routes for the data's `type`, else
 * `message`. A function that returns an outcome (completed, failed, cancelled) ends the stream.
 */

import { plain } from "./dom.js"
import { FileLink } from "./parts.js"

/**
 * @typedef {object} Show see view.js
 * @property {(percent: number | null, label?: string) => void} bar
 * @property {(level: string, text: string, about?: object) => void} line
 * @property {(piece: string) => void} token
 * @property {(text: string) => void} answer
 * @property {(piece: string) => void} reasoning
 * @property {(kind: string, title: string, detail?: string) => void} step
 * @property {(tool: string, asked?: unknown) => void} call
 * @property {(tool: string, result: unknown) => void} returned
 * @property {(row: object) => void} row
 * @property {(kind: string, data: unknown) => void} note
 * @property {(facts: object) => void} facts
 * @property {(text: unknown) => void} figure
 * @property {(sources: unknown[]) => void} sources
 * @property {(text: string, bad?: boolean) => void} remark
 */

const GAPS = {
  trimmed: "Some events are no longer kept. The stream continues with the oldest event kept.",
  diverged: "The service lost its newest events in a crash. The stream continues with the events after it.",
  expired: "The events of this stream are no longer kept.",
}

/** The engine's own events, and defaults. */
const ENGINE = {
  gap: (show, data) => {
    show.remark(GAPS[data.reason] ?? `Events were lost: ${plain(data)}`, true)
    return data.reason === "expired" ? "lost" : undefined
  },
  cancelled: (show, data) => {
    show.remark(data.reason === "linger" ? "Cancelled: no client was reading it." : "Cancelled.")
    return "cancelled"
  },
  error: (show, data) => {
    show.remark(data.error ?? data.message ?? plain(data), true)
    return data.code === "interrupted" ? "interrupted" : "failed"
  },
  item_error: (show, { error, ...where }) => {
    const [[label, number] = ["item", ""]] = Object.entries(where)
    show.line("warning", plain(error), { label: `${label} ${number}`.trim() })
  },
  complete: (show, data) => {
    const { done, ...facts } = Object(data)
    if (Object.keys(facts).length) show.facts(facts)
    return "completed"
  },
  done: () => "completed",
  init: () => {},
  reasoning: (show, data) => show.reasoning(plain(data?.reasoning ?? data?.content ?? data)),
  usage: (show, data) => show.facts(Object(data).usage ?? data),
}

const percentOf = ({ percent, current, total }) => percent ?? (total ? (100 * current) / total : null)
const counted = ({ current, total }) => `${current}${total ? ` of ${total}` : ""}`
const line = (show, data) => show.line("info", plain(data?.message ?? data?.text ?? data))

const LINES = { message: line, update: (show, data) => show.line("info", plain(data), { label: "update" }) }
LINES.config = (show, data) => show.line("info", plain(data), { label: "config" })
LINES.connected = (show, data) => show.line("info", plain(data), { label: "connected" })

const COUNTDOWN = () => {
  let from = null
  return {
    countdown: (show, { remaining }) => {
      from ??= remaining
      show.figure(remaining)
      show.bar((100 * (from - remaining)) / from, `${remaining} s to go`)
    },
    complete: (show, { message }) => {
      show.figure(0)
      show.bar(100, message)
      return "completed"
    },
  }
}

const STEPS = () => {
  let seen = 0
  return {
    progress: (show, { step }) => {
      show.bar((100 * seen) / 3, step)
      show.line("info", step, { label: `step ${++seen}` })
    },
    complete: (show, { result }) => {
      show.bar(100, result)
      return "completed"
    },
  }
}

const AGENT = {
  status: (show, { message }) => show.step("status", message),
  thought: (show, { step, total, total_steps, type, thought, message }) => {
    const of = total ?? total_steps
    show.step("thought", thought ?? message, of ? `${type ?? "thought"} ${step} of ${of}` : type)
  },
  thinking: (show, { step, message, plan }) => {
    const list = Array.isArray(plan) ? plan.map(plain).join(" → ") : plain(plan)
    show.step("thought", message, list ? `${step}: ${list}` : step)
  },
  tool: (show, { tool, status, result, ...rest }) => {
    if (status === "calling") show.call(tool, Object.keys(rest).length ? Object.values(rest)[0] : "")
    else show.returned(tool, result)
  },
  token: (show, data) => show.token(data?.token ?? plain(data)),
  complete: (show, { done, query, message, ...facts }) => {
    if (Object.keys(facts).length) show.facts(facts)
    return "completed"
  },
}

const SESSION = () => {
  let failed = false
  return {
    status: (show, { status }) => show.step("status", status),
    chunk: (show, { content }) => show.token(content),
    result: (show, { content, sources, disclaimer }) => {
      show.answer(content)
      if (sources?.length) show.sources(sources)
      if (disclaimer) show.remark(disclaimer)
    },
    error: (show, { message, error, code }) => {
      failed = true
      show.remark(`${message ?? error}${code ? ` (${code})` : ""}`, true)
    },
    done: () => (failed ? "failed" : "completed"),
  }
}

const CHAT = () => ({ ...SESSION(), message: (show, { content }) => show.token(content) })

const JOB = () => {
  let status = "completed"
  let told = ""
  return {
    message: (show, data) => {
      status = data.status
      told = plain(data.message)
      show.bar(data.progress, data.message || status)
      show.line(status === "failed" ? "error" : "info", data.message || status, { label: `${data.progress} %` })
    },
    done: (show) => {
      const file = /^\d+ (?:files?|tasks?): (\S+)/.exec(told)?.[1]
      if (file && status === "completed") show.facts({ file: new FileLink(file) })
      return ["failed", "cancelled"].includes(status) ? status : "completed"
    },
  }
}

const EXECUTION = {
  status: (show, { step, status, progress }) => show.bar(progress ?? 0, step ?? status),
  result: (show, { step, result, progress }) => {
    show.bar(progress, step)
    show.line("info", plain(result), { label: step })
  },
  progress: (show, { step, progress, timestamp }) => {
    show.bar(progress, step)
    show.line("info", `${progress} %`, { label: step, time: timestamp })
  },
  complete: (show, { duration_seconds, final_status }) => {
    show.bar(100, "done")
    show.facts(duration_seconds === undefined ? { status: final_status } : { seconds: duration_seconds })
    return ["failed", "cancelled"].includes(final_status) ? final_status : "completed"
  },
}

/** @type {Record<string, object | (() => object)>} */
const BY_ROUTE = {
  "GET /stream": LINES,
  "GET /stream/data": LINES,
  "GET /stream/hello": LINES,
  "GET /stream/format": LINES,
  "GET /stream/progress": { progress: (show, { progress }) => show.bar(progress, "Progress") },
  "GET /stream/merge": { message: (show, { source, value }) => show.line("info", plain(value), { label: source }) },
  "GET /stream/errors": {
    ...LINES,
    error: (show, { error, type }) => show.line("error", `${type}: ${error}`),
  },
  "GET /stream/timeout": {
    message: (show, { count }) => show.line("info", plain(count)),
  },
  "GET /countdown/{seconds}": COUNTDOWN,
  "GET /process/stream": STEPS,
  "POST /tasks/import": {
    progress: (show, data) => show.bar(percentOf(data), `${data.current} rows`),
    complete: (show, { status, imported, failed }) => {
      show.bar(100, "Imported")
      show.facts({ imported, failed })
      return status === "failed" ? "failed" : "completed"
    },
  },
  "GET /tasks/stream": { task: (show, row) => show.row(row) },
  "POST /tasks/execute/stream": EXECUTION,
  "POST /tasks/{task_id}/execute/stream": EXECUTION,
  "GET /tasks/{task_id}/progress/stream": EXECUTION,
  "GET /agent/stream": AGENT,
  "GET /agent/think/stream": AGENT,
  "POST /agent/process/stream": AGENT,
  "POST /api/chat": SESSION,
  "GET /chat": CHAT,
  "POST /chat/stream": { token: (show, text) => show.token(plain(text)) },
  "POST /jobs": JOB,
  "GET /api/process/stream": {
    progress: (show, { current_step, total_steps, step_name, percent }) =>
      show.bar(percent, `${step_name} · step ${current_step} of ${total_steps}`),
    log: (show, { level, message, timestamp, details }) =>
      show.line(String(level).toLowerCase(), message, { time: timestamp, details }),
    result: (show, { data }) => {
      const { file, ...facts } = data && typeof data === "object" ? data : { result: data }
      show.facts(file ? { ...facts, file: new FileLink(file) } : facts)
      return "completed"
    },
  },
  "POST /process": {
    progress: (show, { item, ...count }) => {
      show.bar(percentOf(count), counted(count))
      show.line("info", item.sha256, { label: `${item.length}` })
    },
    complete: (show, { status, processed, failed }) => {
      show.facts({ processed, failed })
      return status === "failed" ? "failed" : "completed"
    },
  },
  "GET /users/{user_id}/stream": {
    message: (show, data) => show.note("message", data),
    notification: (show, data) => show.note("notification", data),
    heartbeat: () => {},
  },
  "GET /topics/{name}": {},
}

/** The text itself if it is not JSON. */
function parsed(data) {
  try {
    return JSON.parse(data)
  } catch {
    return data
  }
}

/** Routes whose data are plain text: a token "1" is not a number. */
const BARE = new Set(["POST /chat/stream"])
/** Routes without event names: the data have a `type`. */
const TYPED = new Set(["POST /api/chat", "GET /chat", "GET /stream/data", "GET /stream/merge", "POST /jobs"])
const WITHOUT_END = new Set(["GET /users/{user_id}/stream", "GET /topics/{name}"])

/**
 * A function that translates one stream's events into calls of `show`.
 * @param {string} declared the route as in GET /runs, such as "GET /chat"; an unknown route is shown line by line
 * @returns {(show: Show, event: {type: string, data: string}) => string | undefined} an outcome at the end
 */
export function interpreter(declared) {
  const route = declared.replaceAll(/:\w+}/g, "}") // {seconds:int}
  const known = BY_ROUTE[route] ?? LINES
  const words = { ...ENGINE, ...(typeof known === "function" ? known() : known) }
  const endless = WITHOUT_END.has(route)
  return (show, { type, data }) => {
    if (data === "[DONE]" && type === "message") return words.done(show, "")
    const value = BARE.has(route) && ["token", "reasoning"].includes(type) ? data : parsed(data)
    const typed = type === "message" && (TYPED.has(route) || !BY_ROUTE[route]) && value && typeof value === "object"
    const name = typed && Object.hasOwn(words, value.type ?? "message") ? (value.type ?? "message") : type
    const word = Object.hasOwn(words, name) ? words[name] : null
    if (endless && !["init", "gap", "heartbeat"].includes(name)) {
      show.note(name, value)
      return undefined
    }
    if (!word) {
      show.line("info", plain(value), { label: name })
      return undefined
    }
    try {
      const outcome = word(show, value)
      return endless || typeof outcome !== "string" ? undefined : outcome
    } catch {
      show.line("warning", plain(value), { label: `${name}?` }) // unexpected data
      return undefined
    }
  }
}
