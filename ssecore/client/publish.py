"""The command `sseapp publish`, and what it shares with `sseapp listen`.

It never retries: if only the response was lost, a second request would publish a second event.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

import anyio
import httpx
import orjson

from ssecore.client.outbound import http_client
from ssecore.client.source import json_object

__all__ = ["authorization", "configure", "explain", "fail", "json_argument", "publish"]

TOKEN: Final = "SSEAPP_TOKEN"
TIMEOUT_S: Final = 30.0
#: Exit codes, for --help.
ENDS: Final = {
    0: "the event is stored; its id is printed",
    2: "the command, the URL or the data can't be used",
    3: "the service refused the event; its reason is on stderr",
    4: "the service didn't respond",
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def configure(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    explain(parser, "Publish one event to /topics/TOPIC of a running service.", ENDS)
    parser.add_argument("topic", metavar="TOPIC")
    parser.add_argument("data", metavar="JSON", help="the event's data; @FILE reads a file, @- stdin")
    parser.add_argument("--event", help="the event's name; default: message")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the service; default: %(default)s")


def publish(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    try:
        content = json_argument(options.data)
        base = httpx.URL(options.url)
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError(f"--url: {options.url!r} is not an http or https URL")
        query = "" if options.event is None else f"?event={quote(options.event, safe='')}"
        url = f"{str(base).rstrip('/')}/topics/{quote(options.topic, safe='')}{query}"
        return anyio.run(_publish, url, content, {"content-type": "application/json", **authorization(options)})
    except KeyboardInterrupt:
        return 130
    except (httpx.TransportError, TimeoutError) as error:
        return fail(f"no response from {options.url}: {error or type(error).__name__}", 4)
    except (ValueError, OSError, httpx.InvalidURL) as error:
        return fail(str(error), 2)


async def _publish(url: str, content: bytes, headers: dict[str, str]) -> int:
    with anyio.fail_after(TIMEOUT_S):
        async with http_client(timeout=TIMEOUT_S) as http:
            answer = await http.post(url, content=content, headers=headers)
    body = json_object(answer.content)
    if answer.status_code == 202 and "id" in body:
        print(_CONTROL.sub("", str(body["id"])))
        return 0
    detail = f": {body['detail']}" if "detail" in body else ""
    return fail(f"the service answered {answer.status_code}{detail}", 3)


def explain(parser: argparse.ArgumentParser, description: str, ends: Mapping[int, str]) -> None:
    """The command's help, and its option for a token."""
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in ends.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = description
    parser.epilog = f"environment variables:\n  {TOKEN}  the token, hidden from `ps`\n\nexit codes:\n{codes}"
    parser.add_argument("--token", help=f"send `Authorization: Bearer TOKEN`; the variable {TOKEN} is safer")


def authorization(options: argparse.Namespace) -> dict[str, str]:
    """The token's header. Raises `ValueError`."""
    token = options.token or os.environ.get(TOKEN)
    if token is None:
        return {}
    if not (token.isascii() and token.isprintable()):
        raise ValueError("the token can't be sent: it has a character that is invalid in a header")
    return {"authorization": f"Bearer {token}"}


def fail(text: str, code: int) -> int:
    """Print an error in one line. Returns the exit code."""
    print(f"sseapp: {_CONTROL.sub(' ', text)}", file=sys.stderr)
    return code


def json_argument(text: str, what: str = "the data") -> bytes:
    """JSON from an argument, or from `@FILE` or `@-` (standard input). Raises `ValueError`."""
    content = text.encode()
    if text == "@-":
        content = sys.stdin.buffer.read()
    elif text.startswith("@"):
        try:
            content = Path(text[1:]).read_bytes()
        except OSError as error:
            raise ValueError(f"{what}: can't read {text[1:]}: {error.strerror}") from None
    try:
        orjson.loads(content)
    except ValueError as error:
        raise ValueError(f"{what}: not JSON: {error}") from None
    return content
