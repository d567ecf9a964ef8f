/**
 * Sign in with a token, and sign out.
 *
 * `POST /session` exchanges the token for a cookie that no script can read; the page doesn't store the token.
 */

import { element, setText } from "./dom.js"
import { Problem, call, whenUnauthorized } from "./service.js"

export class Session {
  /** The caller's name; null if authentication is off. */
  caller = null

  /**
   * @param {HTMLElement} who for the name
   * @param {HTMLElement} door for the form
   * @param {object} hooks
   * @param {() => void} hooks.onEnter
   * @param {() => void} hooks.onLeave
   */
  constructor(who, door, hooks) {
    this.hooks = hooks
    this.name = element("span", {})
    this.leave = element("button", { type: "button", class: "plain", hidden: true, onclick: () => this.#signOut() }, "Sign out")
    who.append(this.name, this.leave)
    this.door = door
    this.token = element("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", required: true })
    this.error = element("p", { class: "error", role: "alert" })
    const form = element("form", { class: "sign-in" })
    form.append(
      element("label", { for: "token" }, "Sign in with a token"),
      element("div", {}, this.token, element("button", { type: "submit", class: "primary" }, "Sign in")),
      element("p", { class: "hint" }, "The operator of the service creates tokens: ", element("code", {}, "sseapp token add NAME")),
      this.error,
    )
    form.addEventListener("submit", (event) => {
      event.preventDefault()
      this.#signIn()
    })
    door.append(form)
    document.addEventListener("visibilitychange", () => !document.hidden && this.caller !== null && this.ask())
    // Only the first refusal has the reason.
    whenUnauthorized((problem) => this.caller && this.#signedOut(`You are signed out: ${problem.message}.`))
  }

  /** Get the caller's name. A 401 shows the form. */
  async ask() {
    try {
      const { caller } = await (await call("session")).json()
      if (this.caller !== null && caller !== this.caller) this.hooks.onLeave() // another user signed in, in another tab
      if (this.caller === null || caller !== this.caller) this.#entered(caller)
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem
      if (problem.status === 401) {
        if (this.door.hidden) this.#signedOut("")
        return
      }
      setText(this.name, problem.message)
      if (this.caller === null) this.hooks.onEnter() // the service may be back soon
    }
  }

  async #signIn() {
    setText(this.error, "")
    try {
      const token = this.token.value.trim()
      if (!/^[!-~]+$/.test(token)) throw new Problem(0, "this is not a token") // and can't be sent in a header
      const headers = { Authorization: `Bearer ${token}` }
      const { caller } = await (await call("session", { method: "POST", headers })).json()
      this.token.value = ""
      this.#entered(caller)
    } catch (problem) {
      if (!(problem instanceof Problem)) throw problem
      this.#signedOut(problem.message)
      this.token.focus()
    }
  }

  async #signOut() {
    try {
      await call("session", { method: "DELETE" })
      this.hooks.onLeave()
      this.#signedOut("")
      this.token.focus()
    } catch (problem) {
      setText(this.name, problem.message)
    }
  }

  #entered(caller) {
    this.caller = caller
    this.door.hidden = true
    this.leave.hidden = caller === null
    if (caller === null) setText(this.name, "No sign-in needed")
    else this.name.replaceChildren("Signed in as ", element("b", {}, caller))
    this.hooks.onEnter()
  }

  #signedOut(why) {
    this.caller = null
    this.door.hidden = false
    this.leave.hidden = true
    setText(this.name, "Signed out")
    setText(this.error, why)
  }
}
