"""A program: llama.cpp's server on loopback, with OpenAI's chat completions.

It reads its API key from stdin, prints its address, and exits when stdin is closed, so it can't outlive the service.
"""

import os
import signal
import sys
import threading
from typing import IO, Final

import xllamacpp

#: Enough for the longest prompt of `GET /chat` in English. A token costs 23 KB.
CONTEXT_TOKENS: Final = 4096
ANSWERS: Final = 2
#: So small a model doesn't always stop.
MAX_ANSWER_TOKENS: Final = 512
#: Takes up to 2 s, during which no disconnect is detected.
BATCH_TOKENS: Final = 512
#: More would slow down the service.
MAX_THREADS: Final = 2


def main(weights: str) -> None:
    # Ctrl-C signals all processes, but the drain needs this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    address = os.dup(1)
    os.dup2(2, 1)  # libraries may print to stdout
    with open(0, "rb", buffering=0) as service:
        key = service.readline().decode().strip()
        threading.Thread(target=_end_with, args=(service,), daemon=True).start()
        server = xllamacpp.Server(_parameters(weights, key))
        os.write(address, f"{server.listening_address}\n".encode())
        threading.Event().wait()


def _end_with(service: IO[bytes]) -> None:
    service.read()
    os._exit(0)


def _parameters(weights: str, key: str) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = weights
    params.model_alias = {"local"}  # else the file's path
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [key]  # web pages in a browser can reach loopback
    params.ui = params.endpoint_slots = False
    params.n_ctx, params.n_parallel = CONTEXT_TOKENS * ANSWERS, ANSWERS
    params.n_predict, params.n_batch = MAX_ANSWER_TOKENS, BATCH_TOKENS
    params.cpuparams.n_threads = min(MAX_THREADS, os.cpu_count() or 1)
    params.cache_ram_mib = 0  # default: up to 8 GiB of earlier prompts
    params.warmup = False  # costs more than it saves
    params.verbosity = 1  # errors only
    # Recommended by the model's authors; without the penalty it repeats phrases.
    params.sampling.temp, params.sampling.top_p, params.sampling.penalty_repeat = 0.2, 0.9, 1.1
    return params


if __name__ == "__main__":
    main(sys.argv[1])
