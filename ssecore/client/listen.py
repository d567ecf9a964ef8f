"""The command `sseapp listen`: a stream on a terminal, in a pipe, or into a file.

A boundary of trust, too: on a terminal no control character of the server's is printed.
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
from ssecore.client.publish import json_argument
from ssecore.wire import Event

__all__ = ["ENDS", "configure", "listen"]

TOKEN: Final = "SSEAPP_TOKEN"
#: Exit codes, for --help.
ENDS: Final = {
    0: "the stream came to its end",
    1: "it ended with an `error` or `cancelled` event",
    2: "the command, the address or the file can't be used",
    3: "the server refused (its words are on stderr)",
    4: "the stream broke off and can't be resumed, or wasn't there for too long",
    130: "Ctrl-C",
}
#: How late an event may be in `--batch`.
WITHIN_S: Final = 1.0
BAR: Final = 30
#: Members of a progress event that say what is being done, and how much of it fits behind the bar.
LABELS: Final = ("message", "step_name", "step", "status")
MAX_LABEL: Final = 40
#: A token of RFC 9110, 5.6.2: the name of a header, or a method.
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: C0, C1, and what turns the direction of writing: a server must not steer a terminal. Lines and tabs stay.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in ENDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Reads a stream to its end, over lost connections. On a terminal progress is a bar, and tokens are text.\n"
        'Elsewhere each event is a line of JSON, {"id", "event", "data"}.'
    )
    parser.epilog = f"variables:\n  {TOKEN}  the token, where no other user's `ps` shows it\n\nexit codes:\n{codes}"
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--post", metavar="JSON", help="ask by POST, with this body; @FILE reads it, @- from stdin")
    parser.add_argument("--method", help="ask by another method than GET, or POST with --post")
    parser.add_argument(
        "--header", metavar="NAME:VALUE", action="append", default=[], help="send this one too; several add up"
    )
    parser.add_argument("--token", help=f"sent as `Authorization: Bearer`; better set the variable {TOKEN}")
    parser.add_argument(
        "--to", metavar="FILE", help="write JSON Lines into this file; started again, go on after its last event"
    )
    parser.add_argument("--batch", metavar="N", type=int, help="print JSON arrays of up to N events, each second")


def listen(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code."""
    logging.basicConfig(format="sseapp: %(message)s", stream=sys.stderr)
    logging.getLogger("sseapp").setLevel(logging.INFO)
    try:
        source = _source(options)
    except ValueError as error:
        print(f"sseapp: {error}", file=sys.stderr)
        return 2
    screen = Screen(sys.stdout)
    try:
        return anyio.run(_listen, source, options, screen)
    except KeyboardInterrupt:
        return 130
    except Refused as error:
        return _say(error, 3)
    except (SourceError, httpx.InvalidURL, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `| head`: whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
            return 0
        return _say(error, 4 if isinstance(error, Broken | GaveUp) else 2)
    finally:
        screen.close()


def _say(error: Exception, code: int) -> int:
    print(f"sseapp: {_safe(str(error))}", file=sys.stderr)
    return code


def _source(options: argparse.Namespace) -> Source:
    if options.batch is not None and (options.batch < 1 or options.to):
        raise ValueError("--batch: at least 1, and not together with --to")
    content = None if options.post is None else json_argument(options.post, "--post")
    headers = {} if content is None else {"content-type": "application/json"}
    token = options.token or os.environ.get(TOKEN)
    if token is not None:
        headers["authorization"] = f"Bearer {token}"
    for header in options.header:
        name, colon, value = header.partition(":")
        if not colon or not _NAME.fullmatch(name):
            raise ValueError(f"--header: {name!r:.60} is not a header's name and a colon, as in 'X-Name: value'")
        headers[name.lower()] = value.strip()
    if options.method is not None and not _NAME.fullmatch(options.method):
        raise ValueError(f"--method: {options.method!r:.60} is not a method")
    method = options.method.upper() if options.method else None
    return connect(options.url, method=method, content=content, headers=headers, gaps="yield")


async def _listen(source: Source, options: argparse.Namespace, screen: "Screen") -> int:
    async with source:
        if options.to:
            if not await to_file(source, options.to) and source.last_event_id:
                print(f"sseapp: {options.to} is complete already: the stream has nothing more", file=sys.stderr)
        elif options.batch:
            async with aclosing(batches(source, options.batch, WITHIN_S)) as groups:  # type: ignore[type-var]
                async for group in groups:
                    screen.write(b"[" + b",".join([json_line(event)[:-1] for event in group]) + b"]\n")
        else:
            async for event in source:
                screen.take(event)
    return int(source.failed)


class Screen:
    """Where events are shown: lines of JSON, or on a terminal what a person wants to see."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._shows = output.isatty()
        self._open: Literal["", "bar", "text"] = ""  # what stands in the unfinished line

    def write(self, content: bytes) -> None:
        """Bytes as they are, at once."""
        self._output.buffer.write(content)
        self._output.buffer.flush()

    def take(self, event: Event) -> None:
        """One event."""
        if self._shows:
            self._output.write(self._shown(event))
            self._output.flush()
        else:
            self.write(json_line(event))

    def close(self) -> None:
        """End the line that is open."""
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
        """What has to be written before something of this kind: a bar takes the place of the last one."""
        before, self._open = self._open, kind
        if not before or before == kind == "text":
            return ""
        return "\r\x1b[K" if before == kind == "bar" else "\n"


def _token(event: Event, data: dict[str, Any]) -> str | None:
    """A piece of a model's answer, in one of the service's vocabularies."""
    if event.event == "token":
        return str(data.get("token", event.data))
    if event.event is None and isinstance(data.get("content"), str) and data.get("type", "chunk") == "chunk":
        return str(data["content"])
    return None


def _share(data: dict[str, Any]) -> float | None:
    """How much is done, 0 to 1, of an event that tells progress."""
    done, total = data.get("percent", data.get("progress")), 100
    if done is None:
        done, total = data.get("current"), data.get("total", 0)
    if not isinstance(done, int | float) or not isinstance(total, int) or total <= 0:
        return None
    return min(max(float(done) / total, 0.0), 1.0)


def _safe(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
