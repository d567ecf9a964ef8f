/** The page: the form, the board of open streams and the list of runs, each knowing nothing of the others. */

import { Board } from "./board.js"
import { GROUPS } from "./catalog.js"
import { Chart } from "./chart.js"
import { setText } from "./dom.js"
import { StartForm } from "./form.js"
import { RunList } from "./runs.js"
import { call } from "./service.js"

const at = (id) => document.getElementById(id)

const chart = new Chart(at("chart"))
const runs = new RunList(at("runs"), (run) => board.open(targetOf(run)).catch((problem) => runs.say(problem.message)))
const board = new Board(at("streams"), {
  onEvent: () => chart.count(),
  onCount: (live, most, waiting) =>
    setText(at("connections"), `${live} of ${most} connections${waiting ? `, ${waiting} waiting` : ""}`),
  announce: (text) => setText(at("announcer"), text),
  onRuns: () => runs.refresh(),
  onRun: (target) => runs.remember(target),
  onClose: (view) => {
    if (view.target.run && location.hash === `#run=${view.target.run}`) history.replaceState(null, "", location.pathname)
  },
})

new StartForm(at("start"), async (target, values) => {
  const view = await board.open(target)
  for (const name of (values.listen ?? "").split(",")) view.connection.listen(name.trim())
  runs.refresh()
})

/** A run that is there, read again from its start. */
function targetOf({ run, route: declared }) {
  const route = declared.replaceAll(/:\w+}/g, "}") // {task_id:int}
  const title = GROUPS.flatMap((group) => group.streams).find((stream) => stream.route === route)?.name ?? "Run"
  const url = route === "POST /jobs" ? `jobs/${run}/progress` : `runs/${run}/events`
  return { title, about: "", route, life: "run", url, run }
}

/** `#run=<id>`: a link to a run, for another tab. */
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
board.restore()
openLinked()
runs.refresh()
