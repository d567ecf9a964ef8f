// Types of resuming-fetch.js.

/** A `fetch` whose event streams go on after a cut. Hand it to whatever takes a `fetch`. */
export declare const resumingFetch: typeof globalThis.fetch
export default resumingFetch

/** The same over another `fetch`: one that adds a header, or logs. */
export declare function makeResumingFetch(fetch?: typeof globalThis.fetch): typeof globalThis.fetch

/**
 * An `EventSource` over the body of any event stream, a POST's too: `EventSource.fromReadableStream` where the platform
 * has it. It never reconnects by itself: at the stream's end it closes, and fires `error`.
 */
export declare function eventSource(body: ReadableStream<Uint8Array>): EventStream

export interface EventStream extends EventTarget {
  readonly readyState: number
  readonly lastEventId: string
  close(): void
}
