// node resuming.js: resuming-fetch.js against a server that does everything wrong, one case after the other.
// Prints a line for each case that is as it should be; anything else ends it with an error.
import assert from "node:assert/strict"
import { createServer } from "node:http"
import { createParser } from "eventsource-parser"
import { eventSource, makeResumingFetch, resumingFetch } from "../../handlers/page/static/resuming-fetch.js"

let answer // what the server does with a request: (request, response, the request's number)
let asked = []
const server = createServer((request, response) => {
  asked.push(request)
  request.resume() // its body
  answer(request, response, asked.length)
})
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve))
const url = `http://127.0.0.1:${server.address().port}`
const SSE = { "content-type": "text/event-stream" }

const cut = (response) => response.socket.destroy()
const events = (text) => {
  const found = []
  const parser = createParser({ onEvent: ({ id, event, data }) => found.push([id, event, data]) })
  parser.feed(text)
  return found
}

const CASES = {
  async "cut at every byte, no event is lost and none comes twice"() {
    const parts = [
      'retry: 0\ndata: {"n": "é😀"}\nid: r.1\n\n',
      ":\n:\nevent: two\r\ndata: a\r\ndata: b\r\nid: r.2\r\n\r\n",
      "id: r.3\ndata: three\n\n:\n",
      "data: last\rid: r.4\r\r",
    ]
    const whole = Buffer.from(parts.join(""))
    const ends = parts.map((_, n) => Buffer.from(parts.slice(0, n + 1).join("")).length)
    const expected = events(whole.toString().replace(/\r\n?/g, "\n"))
    // From the first line on, which says that there is no need to wait for long.
    for (let at = parts[0].indexOf("\n") + 1; at <= whole.length; at += 1) {
      for (const bytewise of [false, true]) {
        answer = async (request, response, number) => {
          const last = Number(request.headers["last-event-id"]?.slice(2) ?? 0)
          if (last === parts.length) return response.writeHead(204).end()
          const rest = number === 1 ? whole.subarray(0, at) : whole.subarray(ends[last - 1] ?? 0)
          response.writeHead(200, { ...SSE, "content-location": "runs/r" }).flushHeaders()
          if (bytewise && number === 1) for (const byte of rest) response.write(Buffer.of(byte))
          else response.write(rest)
          if (number === 1) setTimeout(() => cut(response), 1)
          else response.end()
        }
        asked = []
        const headers = { authorization: "Bearer x", accept: "text/event-stream", "content-type": "application/json" }
        const response = await resumingFetch(`${url}/chat`, { method: "POST", body: "{}", headers })
        assert.deepEqual(events(await response.text()), expected, `cut at byte ${at}`)
        assert.deepEqual([asked[0].method, asked[0].url], ["POST", "/chat"])
        for (const { method, url, headers } of asked.slice(1)) {
          assert.deepEqual([method, url], ["GET", "/runs/r"])
          assert.deepEqual([headers.authorization, headers["content-type"], headers.accept], ["Bearer x", undefined, "*/*"])
        }
      }
    }
  },

  async "a GET goes on at its own address, with its own headers"() {
    answer = (request, response, number) => {
      if (number === 2) return response.writeHead(204).end()
      response.writeHead(200, SSE).end("retry: 0\ndata: 1\nid: a.1\n\n")
    }
    const headers = { authorization: "Bearer x", accept: "text/event-stream" }
    const response = await resumingFetch(`${url}/topic?x=1`, { headers })
    assert.equal(response.url, `${url}/topic?x=1`)
    assert.match(await response.text(), /data: 1/)
    assert.equal(asked[1].url, "/topic?x=1")
    const { authorization, accept, "last-event-id": last } = asked[1].headers
    assert.deepEqual([authorization, accept, last], ["Bearer x", headers.accept, "a.1"])
  },

  async "[DONE], the id `end` and 204 end it"() {
    for (const last of ["data: [DONE]\nid: a.2\n\n", "data: x\nid: end\n\n"]) {
      asked = []
      answer = (request, response) => response.writeHead(200, { ...SSE, "content-location": "/r" }).end(last)
      await (await resumingFetch(url, { method: "POST" })).text()
      assert.equal(asked.length, 1)
    }
  },

  async "what passes is waited out: refused, 503 with Retry-After, a proxy's 502"() {
    answer = (request, response, number) => {
      if (number === 1) {
        response.writeHead(200, { ...SSE, "content-location": "/r" }).write("retry: 1\ndata: 1\nid: a.1\n\n")
        return setTimeout(() => cut(response), 5)
      }
      if (number === 2) return cut(response)
      if (number === 3) return response.writeHead(502, { "content-type": "text/html" }).end("bad gateway")
      if (number === 4) return response.writeHead(503, { "retry-after": "0" }).end()
      if (number === 5) return response.writeHead(200, SSE).end("data: 2\nid: a.2\n\ndata: [DONE]\n\n")
    }
    assert.deepEqual(events(await (await resumingFetch(url, { method: "POST" })).text()).map((event) => event[2]), [
      "1",
      "2",
      "[DONE]",
    ])
  },

  async "what doesn't pass fails the body"() {
    answer = (request, response, number) => {
      if (number > 1) return response.writeHead(410).end()
      response.writeHead(200, { ...SSE, "content-location": "/r" }).end("retry: 0\ndata: 1\nid: a.1\n\n")
    }
    await assert.rejects((await resumingFetch(url, { method: "POST" })).text(), /can't resume the stream: 410/)
  },

  async "a stream without ids fails when it is cut, as with fetch"() {
    answer = (request, response) => {
      response.writeHead(200, SSE).write("data: 1\n\n")
      setTimeout(() => cut(response), 5)
    }
    await assert.rejects((await resumingFetch(url)).text())
    assert.equal(asked.length, 1)
  },

  async "another origin gets none of the request's headers"() {
    answer = (request, response) => {
      response.writeHead(200, { ...SSE, "content-location": "http://127.0.0.2:1/r" }).end("data: 1\nid: a.1\n\n")
    }
    assert.equal(await (await resumingFetch(url, { method: "POST" })).text(), "data: 1\nid: a.1\n\n")
    assert.equal(asked.length, 1)
  },

  async "anything but a stream is handed on as it is"() {
    answer = (request, response) => response.writeHead(422, { "content-type": "application/json" }).end('{"a":1}')
    const response = await resumingFetch(url, { method: "POST", body: "x" })
    assert.deepEqual([response.status, await response.json()], [422, { a: 1 }])
    await assert.rejects(resumingFetch("http://127.0.0.1:1/"))
  },

  async "abort and cancel end it, while it reads and while it waits"() {
    for (const waits of [false, true]) {
      let gone
      const left = new Promise((resolve) => (gone = resolve))
      answer = (request, response) => {
        response.on("close", gone)
        response.writeHead(200, { ...SSE, "content-location": "/r" }).write("retry: 30000\ndata: 1\nid: a.1\n\n")
        if (waits) setTimeout(() => cut(response), 5)
      }
      const controller = new AbortController()
      const response = await resumingFetch(new Request(url, { signal: controller.signal, method: "POST" }))
      const reader = response.body.getReader()
      await reader.read()
      const rest = reader.read()
      if (waits) await left
      controller.abort()
      await assert.rejects(rest, { name: "AbortError" })
      await left
    }
    let gone
    const left = new Promise((resolve) => (gone = resolve))
    answer = (request, response) => {
      response.on("close", gone)
      response.writeHead(200, { ...SSE, "content-location": "/r" }).write("data: 1\nid: a.1\n\n")
    }
    await (await resumingFetch(url, { method: "POST" })).body.cancel()
    await left
  },

  async "it works over a fetch of one's own"() {
    answer = (request, response) => response.writeHead(200, SSE).end(`data: ${request.headers["x-mine"]}\nid: end\n\n`)
    const mine = (input, init) => fetch(input, { ...init, headers: { ...init.headers, "x-mine": "1" } })
    assert.match(await (await makeResumingFetch(mine)(url)).text(), /data: 1/)
  },

  async "an EventSource over a body has the standard's events, and can be closed"() {
    answer = (request, response) => {
      response.writeHead(200, SSE)
      response.write("\uFEFFdata:1\ndata: 2\nid: a\n\nevent: x\ndata\n\nid: b\n\ndata: lost\r")
      response.end()
    }
    const source = eventSource((await fetch(url)).body)
    const heard = []
    const note = ({ type, data, lastEventId }) => heard.push([type, data, lastEventId])
    source.addEventListener("message", note)
    source.addEventListener("x", note)
    await new Promise((resolve) => source.addEventListener("error", resolve))
    assert.deepEqual(heard, [["message", "1\n2", "a"], ["x", "", "a"]])
    assert.deepEqual([source.readyState, source.lastEventId], [2, "b"])
    source.close()
  },
}

for (const [name, run] of Object.entries(CASES)) {
  asked = []
  await run()
  console.log(name)
}
server.closeAllConnections()
server.close()
