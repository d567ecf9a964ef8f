"""A language model's server, which the chats ask: OpenAI's chat completions, a token at a time.

`python -m benchmarks.peers.chat_upstream RATE TOKENS`: each answer has so many tokens, so many a second; the first
comes one such pause behind the request. A token's text is the moment in which it was written, on a clock that all
processes of this machine share: `t<nanoseconds> `. It must cost little: one timer a token, bytes made once.
"""

import asyncio
import json
import sys
import time
from typing import Any

import uvloop

_CHUNK = {
    "id": "chatcmpl-abc123def456",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "gpt-4o-mini-2024-07-18",
    "service_tier": "default",
    "system_fingerprint": "fp_0123456789",
}
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def _event(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _event(json.dumps({**_CHUNK, "choices": [choice], "usage": None}))


_FIRST = _chunk({"role": "assistant", "content": ""}, None)
_LAST = _chunk({}, "stop") + _event("[DONE]") + b"0\r\n\r\n"
#: With the moment's digits to be put in; the chunk's size counts all twenty of them.
_TOKEN = _chunk({"content": f"t{0:020} "}, None).replace(b"0" * 20, b"%020d")


class Answer(asyncio.Protocol):
    rate, tokens = 20.0, 100

    def connection_made(self, transport: Any) -> None:  # uvloop's is no asyncio.Transport
        self._transport, self._request = transport, b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._request += data
        head, end, body = self._request.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if end and len(body) >= length:
            self._request = b""
            self._transport.write(_HEAD + _FIRST)
            self._left, self._next = self.tokens, self._loop.time()
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._next += 1 / self.rate
        self._timer = self._loop.call_at(self._next, self._write)

    def _write(self) -> None:
        self._transport.write(_TOKEN % time.monotonic_ns())
        self._left -= 1
        if self._left:
            self._wait()
        else:
            self._transport.write(_LAST)


async def main(rate: float, tokens: int) -> None:
    Answer.rate, Answer.tokens = rate, tokens
    server = await asyncio.get_running_loop().create_server(Answer, "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]), int(sys.argv[2])))
