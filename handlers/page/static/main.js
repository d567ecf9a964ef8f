/** Connects the page's independent parts: form, board of open streams, list of runs, session. */

import { Board } from "./board.js"
import { GROUPS, IMPORT } from "./catalog.js"
import { Chart } from "./chart.js"
import { setText } from "./dom.js"
import { StartForm } from "./form.js"
import { RunList } from "./runs.js"
import { Problem, call } from "./service.js"
import { Session } from "./session.js"
import { start } from "./start.js"

const at = (id) => document.getElementById(id)
const STREAMS = GROUPS.flatMap((group) => group.streams)

const chart = new Chart(at("chart"))
const runs = new RunList(at("runs"), at("runs-summary"), {
  onOpen: (run) => board.open(targetOf(run)).catch((problem) => runs.say(problem.message)),
  nameOf: (declared) => streamOf(declared)?.name ?? plainRoute(declared),
})
const board = new Board(at("streams"), {
  onEvent: ({ target, connection }) => {
    chart.count()
    if (target.run) runs.count(target.run, Number(connection.lastId.split(".")[1] ?? 0))
  },
  onCount: (live, most, waiting) =>
    setText(at("connections"), `${live} of ${most} connections${waiting ? `, ${waiting} waiting` : ""}`),
  announce: (text) => setText(at("announcer"), text),
  onRuns: () => runs.refresh(),
  onRun: (target) => runs.remember(target),
  onClose: (view) => {
    if (view.target.run && location.hash === `#run=${view.target.run}`) history.replaceState(null, "", location.pathname)
  },
  onEnd: (view) => {
    if (view.target.route === IMPORT.route) lookForTasks()
  },
  signedIn: () => session.caller !== null,
  next: (target, said, turns) => {
    const stream = STREAMS.find(({ id }) => id === target.talks)
    return start(stream, { ...target.values, [stream.talks]: said }, turns)
  },
})

const form = new StartForm(at("start"), async (target, values) => {
  const view = await board.open(target)
  for (const name of (values.listen ?? "").split(",")) view.connection.listen(name.trim())
  runs.refresh()
})

let restored = false
const session = new Session(at("who"), at("door"), {
  onEnter: () => {
    if (!restored) board.restore()
    restored = true
    form.clear()
    openLinked()
    runs.refresh()
    lookForTasks()
  },
  onLeave: () => {
    board.closeAll()
    runs.clear()
  },
})

/** Offer to import tasks if there are none: the agent would find nothing. */
async function lookForTasks() {
  let rows = ""
  try {
    rows = await (await call("tasks/stream?limit=1")).text()
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem
    return
  }
  const bare = !rows.includes("event: task\n")
  form.bare = bare
  form.offer(bare ? "There are no tasks yet for the agent to find." : null, "Add six samples", async () => {
    try {
      await board.open(await start(IMPORT, { csv: IMPORT.fields.find(({ name }) => name === "csv").value }))
    } catch (problem) {
      runs.say(problem.message)
    }
  })
}

const plainRoute = (declared) => declared.replaceAll(/:\w+}/g, "}") // {task_id:int}

function streamOf(declared) {
  return STREAMS.find((stream) => stream.route === plainRoute(declared))
}

/** Read an existing run from its start. */
function targetOf({ run, route: declared, about = "" }) {
  const route = plainRoute(declared)
  const title = streamOf(declared)?.name ?? "Run"
  const url = route === "POST /jobs" ? `jobs/${run}/progress` : `runs/${run}/events`
  return { title, about, route, life: "run", url, run }
}

/** `#run=<id>` is a link to a run. */
async function openLinked() {
  const run = /^#run=([\w-]{22})$/.exec(location.hash)?.[1]
  if (!run) return
  try {
    await board.open(targetOf(await (await call(`runs/${run}`)).json()))
  } catch (problem) {
    runs.say(`${location.hash}: ${problem.message}`)
  }
}

window.addEventListener("hashchange", openLinked)
session.ask()
