"""Writes a stream to a file again and again, in processes that are killed: `python -m tests.writer URL FILE`.

Each line of its input starts one, by a fork: it prints the child's id at once, and its exit code when it has ended.
(A fork, because Python takes a third of a second to begin: a hundred of them would take the test half a minute.)
"""

import os
import sys

import anyio
import httpx

from ssecore.client import connect, to_file


async def write(url: str, path: str) -> None:
    async with httpx.AsyncClient(verify=False, trust_env=False) as http, connect(url, client=http) as source:
        await to_file(source, path)


def main(url: str, path: str) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            anyio.run(write, url, path)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
