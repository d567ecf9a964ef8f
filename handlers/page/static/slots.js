/**
 * Limits how many streams are open.
 *
 * Over HTTP/1.1 a browser opens six connections to a site for all tabs; a seventh request waits forever behind six
 * streams. So the tabs share four slots as Web Locks, which a closed tab releases. Without Web Locks (plain http beyond
 * loopback) each tab counts its own streams.
 */

const OVER_HTTP_1 = 4
const OVER_HTTP_2 = 24
/** There is no message for a slot that a closed tab released. */
const LOOK_AGAIN_MS = 2000

export class Slots {
  #held = 0
  #channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("sseapp-slots") : null

  /** @param {() => void} onFree called when a slot may be free */
  constructor(onFree) {
    const [navigation] = performance.getEntriesByType("navigation")
    const multiplexed = ["h2", "h3"].includes(navigation?.nextHopProtocol)
    this.count = multiplexed ? OVER_HTTP_2 : OVER_HTTP_1
    this.onFree = onFree
    if (this.#channel) this.#channel.onmessage = onFree
    setInterval(onFree, LOOK_AGAIN_MS)
  }


  /**
   * A slot, or null if none is free.
   * @returns {Promise<null | (() => Promise<void>)>} releases it
   */
  async take() {
    if (!navigator.locks) return this.#held < this.count ? this.#taken(() => {}, Promise.resolve()) : null
    for (let number = 0; number < this.count; number++) {
      const release = await this.#lock(`sseapp-slot-${number}`)
      if (release) return release
    }
    return null
  }

  #lock(name) {
    return new Promise((resolve) => {
      const over = navigator.locks.request(name, { ifAvailable: true }, (lock) => {
        if (lock === null) return resolve(null)
        return new Promise((release) => resolve(this.#taken(release, () => over)))
      })
    })
  }

  #taken(release, over) {
    this.#held++
    let given = false
    return async () => {
      if (given) return
      given = true
      this.#held--
      release()
      await (typeof over === "function" ? over() : over)
      this.#channel?.postMessage("free")
      this.onFree()
    }
  }
}
