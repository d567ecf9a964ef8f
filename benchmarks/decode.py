"""How fast a stream's bytes become events, ours beside httpx-sse: CPU time an event, on one core, without a network."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
from httpx_sse import EventSource

from benchmarks.report import Check, Report, Spread
from ssecore.wire import Decoder, Event, encode

__all__ = ["run"]

CPU = "CPU µs/event"
STREAMS: dict[str, Event] = {
    "data": Event({"content": "word"}),
    "event, data": Event({"content": "word"}, event="token"),
    "id, event, data": Event({"content": "word"}, event="token", id="abcdefghijklmnopqrstuv.100"),
}


def run(*, rounds: int = 5, count: int = 100_000, chunk_bytes: int = 65536) -> Report:
    """`count` events in chunks of `chunk_bytes`, as a fast stream or a replay comes; httpx-sse sync and async."""
    report = Report("decode", {"rounds": rounds, "count": count, "chunk_bytes": chunk_bytes})
    contenders: dict[str, Callable[[list[bytes]], int]] = {
        "Decoder": _ours,
        "httpx-sse": _httpx_sse,
        "httpx-sse, async": _httpx_sse_async,
    }
    found: list[dict[str, dict[str, float]]] = [{} for _ in range(rounds)]
    for name, event in STREAMS.items():
        body = encode(event) * count
        chunks = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)]
        for one in found:
            for contender, read in contenders.items():
                began_s = time.process_time()
                if read(chunks) != count:
                    raise RuntimeError(f"{contender}: not {count} events")
                one[f"{contender}: {name}"] = {CPU: 1e6 * (time.process_time() - began_s) / count}
    report.add_rounds(found)
    for name in STREAMS:
        for peer in ("httpx-sse", "httpx-sse, async"):
            times = Spread.of(one[f"{peer}: {name}"][CPU] / one[f"Decoder: {name}"][CPU] for one in found)
            report.checks.append(Check(f"times as fast as {peer}: {name}", times, at_least=10))
    return report


def _ours(chunks: list[bytes]) -> int:
    decoder = Decoder()
    return sum([len(decoder.feed(chunk)) for chunk in chunks])


class _Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


def _answer(chunks: list[bytes]) -> EventSource:
    return EventSource(httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=_Body(chunks)))


def _httpx_sse(chunks: list[bytes]) -> int:
    return sum(1 for _ in _answer(chunks).iter_sse())


def _httpx_sse_async(chunks: list[bytes]) -> int:
    async def read() -> int:
        count = 0
        async for _ in _answer(chunks).aiter_sse():
            count += 1
        return count

    return asyncio.run(read())
