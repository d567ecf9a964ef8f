"""The command `sseapp listen`.

Boundary of trust: control characters that the server sends are never printed to a terminal.
"""

import argparse
import logging
import os
import re
import sys
from contextlib import aclosing
from typing import Any, Final, Literal, TextIO

import anyio
import httpx

from ssecore.client import (
    Broken,
    GaveUp,
    Refused,
    Source,
    SourceError,
    batches,
    connect,
    json_line,
    json_object,
    to_file,
)
from ssecore.client.publish import authorization, explain, fail, json_argument
from ssecore.wire import Event

__all__ = ["configure", "listen"]

#: Exit codes, for --help.
ENDS: Final = {
    0: "the stream has ended",
    1: "the stream has ended with an `error` or `cancelled` event",
    2: "the command, the URL or the file can't be used",
    3: "the server refused the request; its reason is on stderr",
    4: "the stream broke off and can't be resumed, or was unavailable for too long",
    130: "Ctrl-C",
}
#: For `--batch`.
WITHIN_S: Final = 1.0
BAR: Final = 30
#: The first member of a progress event that is set is the bar's label.
LABELS: Final = ("message", "step_name", "step", "status")
MAX_LABEL: Final = 40
#: A token of RFC 9110, 5.6.2: a header's name, or a method.
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: C0, C1 and changes of the writing direction, but not line breaks and tabs.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    description = (
        "Read a stream to its end; lost connections are reopened and resumed. A terminal shows progress as a bar\n"
        'and tokens as text. Otherwise each event is printed as a line of JSON, {"id", "event", "data"}.'
    )
    explain(parser, description, ENDS)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--post", metavar="JSON", help="send a POST with this body; @FILE reads a file, @- stdin")
    parser.add_argument("--method", help="HTTP method; default: GET, or POST with --post")
    parser.add_argument(
        "--header", metavar="NAME:VALUE", action="append", default=[], help="send this header; can be repeated"
    )
    parser.add_argument(
        "--to", metavar="FILE", help="append JSON Lines to this file; if it has events, resume after the last one"
    )
    parser.add_argument("--batch", metavar="N", type=int, help="print JSON arrays of up to N events, one a second")


def listen(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    logging.basicConfig(format="sseapp: %(message)s", stream=sys.stderr)
    logging.getLogger("sseapp").setLevel(logging.INFO)
    try:
        source = _source(options)
    except ValueError as error:
        return fail(str(error), 2)
    screen = Screen(sys.stdout)
    try:
        return anyio.run(_listen, source, options, screen)
    except KeyboardInterrupt:
        return 130
    except (SourceError, httpx.InvalidURL, OSError) as error:
        if isinstance(error, BrokenPipeError):  # such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports an error at exit
            return 0
        return fail(str(error), 3 if isinstance(error, Refused) else 4 if isinstance(error, Broken | GaveUp) else 2)
    finally:
        screen.close()


def _source(options: argparse.Namespace) -> Source:
    if options.batch is not None and (options.batch < 1 or options.to):
        raise ValueError("--batch must be at least 1, and can't be combined with --to")
    content = None if options.post is None else json_argument(options.post, "--post")
    headers = authorization(options) | ({} if content is None else {"content-type": "application/json"})
    for header in options.header:
        name, colon, value = header.partition(":")
        if not colon or not _NAME.fullmatch(name):
            raise ValueError(f"--header: {name!r:.60} is not a header name with a colon: write 'X-Name: value'")
        headers[name.lower()] = value.strip()
    if options.method is not None and not _NAME.fullmatch(options.method):
        raise ValueError(f"--method: {options.method!r:.60} is not an HTTP method")
    method = options.method.upper() if options.method else None
    return connect(options.url, method=method, content=content, headers=headers, gaps="yield")


async def _listen(source: Source, options: argparse.Namespace, screen: "Screen") -> int:
    async with source:
        if options.to:
            if not await to_file(source, options.to) and source.last_event_id:
                print(f"sseapp: {options.to} is complete: the stream has no more events", file=sys.stderr)
        elif options.batch:
            async with aclosing(batches(source, options.batch, WITHIN_S)) as groups:
                async for group in groups:
                    screen.write(b"[" + b",".join([json_line(event)[:-1] for event in group]) + b"]\n")
        else:
            async for event in source:
                screen.take(event)
    return int(source.failed)


class Screen:
    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._shows = output.isatty()
        self._open: Literal["", "bar", "text"] = ""  # kind of the unfinished line

    def write(self, content: bytes) -> None:
        self._output.buffer.write(content)
        self._output.buffer.flush()

    def take(self, event: Event) -> None:
        if self._shows:
            self._output.write(self._shown(event))
            self._output.flush()
        else:
            self.write(json_line(event))

    def close(self) -> None:
        if self._open:
            self._output.write(self._begin(""))
            self._output.flush()

    def _shown(self, event: Event) -> str:
        data = json_object(event.data)
        if (text := _token(event, data)) is not None:
            return self._begin("text") + _safe(text)
        if (share := _share(data)) is not None:
            filled = round(BAR * share)
            label = next((str(data[key]) for key in LABELS if data.get(key)), event.event or "")
            label = _safe(label).replace("\n", " ")[:MAX_LABEL]
            return f"{self._begin('bar')}[{'#' * filled}{'-' * (BAR - filled)}] {100 * share:3.0f}% {label}"
        if event.data in ("", "[DONE]"):
            return self._begin("")
        return f"{self._begin('')}{_safe(event.event or 'message')}: {_safe(event.data)}\n"

    def _begin(self, kind: Literal["", "bar", "text"]) -> str:
        """Text to print before output of this kind: a bar replaces the last bar."""
        before, self._open = self._open, kind
        if not before or before == kind == "text":
            return ""
        return "\r\x1b[K" if before == kind == "bar" else "\n"


def _token(event: Event, data: dict[str, Any]) -> str | None:
    """A model's token, from any of the service's routes."""
    if event.event == "token":
        return str(data.get("token", event.data))
    if event.event is None and isinstance(data.get("content"), str) and data.get("type", "chunk") == "chunk":
        return str(data["content"])
    return None


def _share(data: dict[str, Any]) -> float | None:
    """The progress, 0 to 1."""
    done, total = data.get("percent", data.get("progress")), 100
    if done is None:
        done, total = data.get("current"), data.get("total", 0)
    if not isinstance(done, int | float) or not isinstance(total, int) or total <= 0:
        return None
    return min(max(float(done) / total, 0.0), 1.0)


def _safe(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
