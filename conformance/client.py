"""The suite's client: one request, read strictly and recorded."""

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import httpx

__all__ = ["Client", "Event", "Parser", "Reading", "Target"]

_FIELDS: Final = (b"data", b"event", b"id", b"retry")


@dataclass(frozen=True)
class Event:
    id: str | None  #: as its own block has it
    name: str
    data: str

    @property
    def json(self) -> dict[str, Any]:
        try:
            data = json.loads(self.data)
        except ValueError:
            data = None
        return data if isinstance(data, dict) else {}

    @property
    def is_gap(self) -> bool:
        return "gap" in (self.name, self.json.get("type"))

    def __str__(self) -> str:
        return f"{self.name} {self.id or 'without id'} {self.data[:40]!r}"


class Parser:
    """Interprets a stream as the HTML standard says (9.2.6), and notes what its grammar (9.2.5) doesn't allow."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.faults: list[str] = []
        self.id_early = 0  #: events with another line after their id
        self.comments = 0
        self.retry: int | None = None
        self.retry_first = False  #: before the first event
        self.last_id = ""  #: of the last complete block that has one
        self._rest: bytes | None = None
        self._block: list[tuple[bytes, str]] = []

    def feed(self, data: bytes) -> None:
        if self._rest is None and data.startswith(b"\xef\xbb\xbf"):
            self.faults.append("it begins with a byte order mark")
            data = data[3:]
        rest = (self._rest or b"") + data
        held = b"\r" if rest.endswith(b"\r") else b""  # an LF may follow
        *lines, rest = re.split(rb"\r\n|\r|\n", rest.removesuffix(held))
        self._rest = rest + held
        for line in lines:
            self._line(line)

    def end(self) -> None:
        """The body has ended properly."""
        if (self._rest or b"").strip() or self._block:
            self.faults.append("it ends within a block: no blank line after the last one")

    def _line(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode(errors="replace")
        if not line:
            self._dispatch()
        elif not name:
            self.comments += 1
        elif name not in _FIELDS:
            self.faults.append(f"neither a comment nor a field: {line[:60]!r} (a line break in the data?)")
        elif "\ufffd" in text and "\ufffd".encode() not in value:
            self.faults.append(f"not UTF-8: {line[:60]!r}")
        elif name == b"id" and "\0" in text:
            self.faults.append("an id with NUL: clients ignore it")
        elif name != b"retry":
            self._block.append((name, text))
        elif text.isascii() and text.isdigit():
            self.retry, self.retry_first = int(text), self.retry_first or not self.events
        else:
            self.faults.append(f"retry is not a number: {text[:60]!r}")

    def _dispatch(self) -> None:
        block, self._block = self._block, []
        last = dict(block)
        self.last_id = last.get(b"id", self.last_id)
        if b"data" in last:
            data = "\n".join(text for name, text in block if name == b"data")
            self.events.append(Event(last.get(b"id"), last.get(b"event") or "message", data))
            self.id_early += b"id" in last and block[-1][0] != b"id"


@dataclass(frozen=True)
class Target:
    """Where and how a stream is asked for."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None

    def at(self, location: str) -> "Target":
        """A `Content-Location`: relative to the request's URL (RFC 9110, 8.7)."""
        headers = {name: value for name, value in self.headers.items() if name != "content-type"}
        return Target("GET", str(httpx.URL(self.url).join(location)), headers)


@dataclass
class Reading:
    """One request, and what came."""

    target: Target
    sent: Mapping[str, str | bytes]
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=httpx.Headers)
    text: str = ""  #: the body's beginning, if it is not an event stream
    parser: Parser = field(default_factory=Parser)
    size: int = 0
    ended: bool = False  #: the body's proper end came
    error: str = ""
    first_event_s: float | None = None
    total_s: float = 0.0
    silence_s: float = 0.0  #: the longest time without a byte
    pause_s: float = 0.0  #: the longest time without an event

    @property
    def events(self) -> list[Event]:
        return self.parser.events

    @property
    def is_stream(self) -> bool:
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return self.status == 200 and media_type == "text/event-stream"

    def __str__(self) -> str:
        sent = "".join(f" {name}: {value[:60]!r}" for name, value in self.sent.items())
        came = self.error or ("the end" if self.ended else "disconnected")
        if self.is_stream:
            came = f"{len(self.events)} events, last id {self.parser.last_id!r}, {self.size} bytes, {came}"
        elif self.text:
            came = f"{self.headers.get('content-type', '')} {self.text[:200]!r}, {came}"
        return f"{self.target.method} {self.target.url}{sent} -> {self.status or 'no answer'}: {came}"


class Client:
    def __init__(self, timeout_s: float) -> None:
        self.readings: list[Reading] = []  #: since the current check began
        self._timeout_s = timeout_s
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        # A proxy of the environment would be tested instead of the server.
        self._http = httpx.AsyncClient(timeout=timeout_s, trust_env=False, limits=limits)

    async def close(self) -> None:
        await self._http.aclose()

    async def read(
        self,
        target: Target,
        headers: Mapping[str, str | bytes] | None = None,
        *,
        events: int | None = None,
        size: int | None = None,
        sleep_s: float = 0.0,
    ) -> Reading:
        """Send the request and read to the end, or until there are so many events or bytes; then disconnect.

        After the first bytes it doesn't read for `sleep_s`.
        """
        reading = Reading(target, headers or {})
        self.readings.append(reading)
        every: dict[str, Any] = {"accept": "text/event-stream", "accept-encoding": "identity"}
        every |= {**target.headers, **reading.sent}
        began = monotonic()
        try:
            async with (
                asyncio.timeout(self._timeout_s + sleep_s),
                self._http.stream(target.method, target.url, headers=every, content=target.content) as response,
            ):
                reading.status, reading.headers = response.status_code, response.headers
                byte_s = event_s = monotonic() - began
                async for part in response.aiter_raw():
                    now_s, known = monotonic() - began, len(reading.events)
                    part = part if size is None else part[: size - reading.size]
                    reading.size += len(part)
                    reading.silence_s, byte_s = max(reading.silence_s, now_s - byte_s), now_s
                    if not reading.is_stream:
                        reading.text += part[: max(2000 - len(reading.text), 0)].decode(errors="replace")
                        continue
                    reading.parser.feed(part)
                    if len(reading.events) > known:
                        reading.pause_s, event_s = max(reading.pause_s, now_s - event_s), now_s
                        reading.first_event_s = reading.first_event_s or now_s
                    if reading.size == size or (events is not None and len(reading.events) >= events):
                        break
                    if sleep_s:
                        await asyncio.sleep(sleep_s)
                        sleep_s = 0.0
                else:
                    reading.ended = True
                    reading.parser.end()
        except TimeoutError:
            reading.error = f"not finished after {self._timeout_s} s"
        except httpx.HTTPError as error:
            reading.error = f"{type(error).__name__}: {error}"
        reading.total_s = monotonic() - began
        if events is not None:
            del reading.events[events:]  # they came in one piece with others
        return reading
