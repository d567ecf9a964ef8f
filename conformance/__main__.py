"""Check a server of resumable event streams against docs/protocol.md and the standards it rests on.

Exit code: 0 no check failed, 1 one did, 2 the checks could not be run.
"""

import argparse
import asyncio
import json
import random
import sys
from typing import Any

from conformance.checks import CHECKS, Check, Failed, NotApplicable, Subject
from conformance.client import Target

_WORDS = {"ok": "ok  ", "failed": "FAIL", "not applicable": "n/a "}


def main(arguments: list[str] | None = None) -> int:
    given, target = _options(arguments)
    subject = Subject(given, target)
    results = asyncio.run(_run(subject, [check for check in CHECKS if check.name in given.only]))
    if results is None:
        print(f"no answer from {target.url}: {subject.whole.error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps({"url": target.url, "seed": given.seed, "checks": results}, indent=2))
    else:
        for result in results:
            _print(result, given.verbose)
        found = [result["result"] for result in results]
        print(", ".join(f"{found.count(word)} {word}" for word in _WORDS), f"(seed {given.seed})")
    return int(any(result["result"] == "failed" for result in results))


def _options(arguments: list[str] | None) -> tuple[argparse.Namespace, Target]:
    parser = argparse.ArgumentParser("python -m conformance", description=__doc__)
    names = [check.name for check in CHECKS]
    add = parser.add_argument
    add("url", nargs="?", default="", help="an event stream; if it has no end, give --events too")
    add("-d", "--post", metavar="JSON", help="the stream is started by POST with this body")
    add("-H", "--header", action="append", default=[], metavar="'NAME: VALUE'", help="send it with each request")
    add("--events", type=int, metavar="N", help="the stream has no end: look at N events, 2 or more")
    add("--heartbeat", type=float, metavar="S", help="the server claims a heartbeat each S seconds")
    add("--lost", metavar="ID", help="an id of this stream after which events were dropped")
    add("--keyed", action="store_true", help="the server claims Idempotency-Key")
    add("--origin", help="the server claims CORS for this origin")
    add("--clients", type=int, default=4, metavar="N", help="concurrent clients (4)")
    add("--timeout", type=float, default=30, metavar="S", help="for one request (30)")
    add("--seed", type=int, default=random.randrange(10**6), help="of the places to cut at")
    add("--only", action="append", choices=names, metavar="CHECK", help="run only this check, and others so named")
    add("--skip", action="append", default=[], choices=names, metavar="CHECK", help="the server doesn't claim it")
    add("--list", action="store_true", help="print the checks")
    add("--json", action="store_true", help="print the results as JSON")
    add("-v", "--verbose", action="store_true", help="print what was sent and received also where it is ok")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--lost" in words[:-1]:  # an id may begin with a dash
        at = words.index("--lost")
        words[at : at + 2] = [f"--lost={words[at + 1]}"]
    given = parser.parse_args(words)
    if given.list:
        print("\n".join(f"{check.name:15} {check.required} ({check.source})" for check in CHECKS))
        parser.exit()
    headers = dict([part.strip() for part in line.split(":", 1)] for line in given.header if ":" in line)
    if not given.url.startswith(("http://", "https://")):
        parser.error("give the stream's address; it begins with http:// or https://")
    if len(headers) < len(given.header):
        parser.error("write each header once, as 'Name: value'")
    if (given.events or 2) < 2 or given.clients < 1:
        parser.error("--events must be 2 or more, --clients 1 or more")
    given.only = {name for name in given.only or names if name not in given.skip}
    if given.post is None:
        return given, Target("GET", given.url, headers)
    return given, Target("POST", given.url, {"content-type": "application/json", **headers}, given.post.encode())


async def _run(subject: Subject, checks: list[Check]) -> list[dict[str, Any]] | None:
    """What was found, in order; `None` if the server can't be reached."""
    try:
        await subject.begin()
        return [await _result(check, subject) for check in checks] if subject.whole.status else None
    finally:
        await subject.client.close()


async def _result(check: Check, subject: Subject) -> dict[str, Any]:
    subject.client.readings = []
    try:
        result, found = "ok", await check.run(subject) or ""
    except Failed as failure:
        result, found = "failed", str(failure)
    except NotApplicable as reason:
        result, found = "not applicable", str(reason)
    exchanges = [str(reading) for reading in subject.client.readings[-6:] or [subject.whole]]
    about = {"name": check.name, "required": check.required, "source": check.source}
    return about | {"result": result, "found": found, "exchanges": exchanges}


def _print(result: dict[str, Any], verbose: bool) -> None:
    lines = [f"{_WORDS[result['result']]} {result['name']:15} {result['found']}".rstrip()]
    if result["result"] == "failed":
        lines.append(f"     required: {result['required']} ({result['source']})")
    if result["result"] == "failed" or verbose:
        lines += [f"     {exchange}" for exchange in result["exchanges"]]
    print("\n".join(lines))


if __name__ == "__main__":
    raise SystemExit(main())
