"""The command `sseapp publish`.

It never retries: if only the response was lost, a second request would publish a second event.
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
    codes = "\n".join(f"  {code:<4} {meaning}" for code, meaning in ENDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Publish one event to /topics/TOPIC of a running service."
    parser.epilog = f"environment variables:\n  {TOKEN}  the token, hidden from `ps`\n\nexit codes:\n{codes}"
    parser.add_argument("topic", metavar="TOPIC")
    parser.add_argument("data", metavar="JSON", help="the event's data; @FILE reads a file, @- stdin")
    parser.add_argument("--event", help="the event's name; default: message")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="URL of the service; default: %(default)s")
    parser.add_argument("--token", help=f"send `Authorization: Bearer TOKEN`; the variable {TOKEN} is safer")


def publish(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    try:
        content = json_argument(options.data)
        base = httpx.URL(options.url)
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError(f"--url: {options.url!r} is not an http or https URL")
        query = "" if options.event is None else f"?event={quote(options.event, safe='')}"
        url = f"{str(base).rstrip('/')}/topics/{quote(options.topic, safe='')}{query}"
        token = options.token or os.environ.get(TOKEN)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("the token can't be sent: it has a character that is invalid in a header")
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return anyio.run(_publish, url, content, {"content-type": "application/json", **headers})
    except KeyboardInterrupt:
        return 130
    except (httpx.TransportError, TimeoutError) as error:
        return _fail(f"no response from {options.url}: {error or type(error).__name__}", 4)
    except (ValueError, OSError, httpx.InvalidURL) as error:
        return _fail(str(error), 2)


async def _publish(url: str, content: bytes, headers: dict[str, str]) -> int:
    with anyio.fail_after(TIMEOUT_S):
        async with http_client(timeout=TIMEOUT_S) as http:
            answer = await http.post(url, content=content, headers=headers)
    body: Any = None
    if "json" in answer.headers.get("content-type", ""):
        body = answer.json()
    if answer.status_code == 202 and isinstance(body, dict):
        print(_CONTROL.sub("", str(body.get("id"))))
        return 0
    detail = body.get("detail") if isinstance(body, dict) else None
    return _fail(f"the service answered {answer.status_code}{f': {detail}' if detail else ''}", 3)


def _fail(text: str, code: int) -> int:
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
