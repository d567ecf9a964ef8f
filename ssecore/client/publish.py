"""The command `sseapp publish`: an event to a topic of a running service, from cron, a worker, a shell.

It asks once: a publication whose answer was lost may have come, and a second one would be another event.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import anyio
import httpx
import orjson

from ssecore.client.outbound import http_client

__all__ = ["configure", "json_argument", "publish"]

TOKEN: Final = "SSEAPP_TOKEN"
#: For the whole request.
TIMEOUT_S: Final = 30.0
#: Exit codes, for --help.
ENDS: Final = {
    0: "the event is in the log; its id is printed",
    2: "the command, the address or the data can't be used",
    3: "the service refused (its words are on stderr)",
    4: "the service can't be reached",
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in ENDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Publishes one event to /topics/TOPIC of a running service."
    parser.epilog = f"variables:\n  {TOKEN}  the token, where no other user's `ps` shows it\n\nexit codes:\n{codes}"
    parser.add_argument("topic", metavar="TOPIC")
    parser.add_argument("data", metavar="JSON", help="or @FILE; @- reads standard input")
    parser.add_argument("--event", help="the event's name; default: message")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service; default: %(default)s")
    parser.add_argument("--token", help=f"sent as `Authorization: Bearer`; better set the variable {TOKEN}")


def publish(options: argparse.Namespace) -> int:
    """Run the command. Returns the exit code."""
    try:
        content = json_argument(options.data)
        base = httpx.URL(options.url)
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError(f"--url: {options.url!r} is not an http or https address")
        query = "" if options.event is None else f"?event={quote(options.event, safe='')}"
        url = f"{str(base).rstrip('/')}/topics/{quote(options.topic, safe='')}{query}"
        token = options.token or os.environ.get(TOKEN)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("the token can't be sent: it has a character that no header may have")
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return anyio.run(_publish, url, content, {"content-type": "application/json", **headers})
    except KeyboardInterrupt:
        return 130
    except (httpx.TransportError, TimeoutError) as error:
        return _say(f"no answer from {options.url}: {error or type(error).__name__}", 4)
    except (ValueError, OSError, httpx.InvalidURL) as error:
        return _say(str(error), 2)


async def _publish(url: str, content: bytes, headers: dict[str, str]) -> int:
    with anyio.fail_after(TIMEOUT_S):
        async with http_client(timeout=TIMEOUT_S) as http:
            answer = await http.post(url, content=content, headers=headers)
    said: Any = None
    if "json" in answer.headers.get("content-type", ""):
        said = answer.json()
    if answer.status_code == 202 and isinstance(said, dict):
        print(_CONTROL.sub("", str(said.get("id"))))
        return 0
    detail = said.get("detail") if isinstance(said, dict) else None
    return _say(f"the service answered {answer.status_code}{f': {detail}' if detail else ''}", 3)


def _say(text: str, code: int) -> int:
    print(f"sseapp: {_CONTROL.sub(' ', text)}", file=sys.stderr)
    return code


def json_argument(text: str, what: str = "the data") -> bytes:
    """What an argument gives: JSON, or with @ the file that holds it (@-: standard input). Raises `ValueError`."""
    content = text.encode()
    if text == "@-":
        content = sys.stdin.buffer.read()
    elif text.startswith("@"):
        try:
            content = Path(text[1:]).read_bytes()
        except OSError as error:
            raise ValueError(f"{what}: {text[1:]} can't be read: {error.strerror}") from None
    try:
        orjson.loads(content)
    except ValueError as error:
        raise ValueError(f"{what}: not JSON: {error}") from None
    return content
