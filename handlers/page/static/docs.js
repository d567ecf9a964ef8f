/** The docs of this version: the files of the folder `docs`. The URL of a page is `?page=runs#section`. */

import { element } from "./dom.js"
import { rendered } from "./markdown.js"

const place = document.getElementById("doc")

async function text(name) {
  const response = await fetch(name)
  if (!response.ok) throw new Error(`${name}: ${response.status}`)
  return response.text()
}

/** Links between the docs lead to this page; a link to a file that isn't served becomes plain text. */
function addressOf(href) {
  const [, name, section = ""] = /^([\w-]+)\.md(#.*)?$/.exec(href) ?? []
  if (name) return `?page=${name}${section}`
  return /^(https:\/\/|#)/.test(href) ? href : null
}

async function show() {
  const pages = JSON.parse(await text("docs/pages.json"))
  const wanted = new URLSearchParams(location.search).get("page") ?? "quickstart"
  const page = pages.find(({ name }) => name === wanted)
  document.getElementById("pages").append(
    ...pages.map(({ name, title }) =>
      element("li", {}, element("a", { href: `?page=${name}`, "aria-current": name === wanted ? "page" : null }, title)),
    ),
  )
  if (!page) throw new Error(`there is no page ${wanted}`)
  document.title = `${page.title} · sseapp`
  place.append(...rendered(await text(`docs/${page.name}.md`), addressOf))
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView()
}

show().catch((error) => place.append(element("p", { class: "remark bad" }, error.message)))
