"""Reads a background response with OpenAI's SDK as it is written, over any number of cuts.

    make run
    pip install openai
    python examples/openai_background.py "how many tasks are overdue?"

Restart the network in the middle: the program resumes after the last event, by `starting_after`. Nothing is generated
twice. SSEAPP_URL chooses another server, SSEAPP_TOKEN is the token.
"""

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from openai import APIConnectionError, InternalServerError, OpenAI, OpenAIError

URL = os.environ.get("SSEAPP_URL", "http://127.0.0.1:8000")
PAUSE_S = 0.5
#: Attempts in a row without an event.
MAX_TRIES = 10


def events(client: OpenAI, question: str) -> Iterator[Any]:
    """All events of one response, each once."""
    begun: Any = client.responses.create(model="agent", input=question, background=True)
    after: int | None = None
    tries = 0
    while tries < MAX_TRIES:
        try:
            more: dict[str, Any] = {} if after is None else {"starting_after": after}
            with client.responses.retrieve(begun.id, stream=True, **more) as stream:
                for event in stream:
                    after, tries = event.sequence_number, 0
                    yield event
                    if event.type in ("response.completed", "response.failed", "response.incomplete"):
                        return
        except (APIConnectionError, InternalServerError):
            pass  # a cut, or nobody there
        tries += 1
        time.sleep(PAUSE_S)
    raise TimeoutError


def main() -> None:
    with OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("SSEAPP_TOKEN", "none")) as client:
        for event in events(client, " ".join(sys.argv[1:]) or "what can you do?"):
            if event.type == "response.output_text.delta":
                print(event.delta, end="", flush=True)
            elif event.type == "response.mcp_call_arguments.done":
                print(f"[{event.arguments}]")
            elif event.type in ("response.failed", "response.incomplete"):
                error = event.response.error
                sys.exit(f"\n{error.message if error else event.response.status}")
    print()


if __name__ == "__main__":
    try:
        main()
    except (APIConnectionError, TimeoutError):
        sys.exit(f"can't reach {URL}: start the service (make run), or set SSEAPP_URL")
    except OpenAIError as error:
        sys.exit(str(error))
