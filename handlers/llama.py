"""The local model's own process: llama.cpp's server on loopback, which speaks OpenAI's chat completions.

A program, started by `local_model.py`: `python llama.py WEIGHTS`. It reads the key that it will ask for from its input,
prints its address when it is ready, and ends when its input ends. So it can't outlive the service: whatever ends that,
SIGKILL too, closes the pipe.
"""

import os
import signal
import sys
import threading
from typing import IO, Final

import xllamacpp

#: Of the prompt and the answer together, for each of the answers under way at once; others wait. It holds the longest
#: prompt of `GET /chat` in plain English. Each token costs 23 KB of memory.
CONTEXT_TOKENS: Final = 4096
ANSWERS: Final = 2
#: So small a model doesn't always find an end.
MAX_ANSWER_TOKENS: Final = 512
#: A prompt is read in pieces of so many tokens, up to 2 s each; only between them it is seen that a client has left.
BATCH_TOKENS: Final = 512
#: More make so small a model little faster, and the service next to it slower.
MAX_THREADS: Final = 2


def main(weights: str) -> None:
    # Ctrl-C, and many a service manager, signal all processes at once: the drain's answers still need this one.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    address = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not be taken for the address
    with open(0, "rb", buffering=0) as service:
        key = service.readline().decode().strip()
        threading.Thread(target=_end_with, args=(service,), daemon=True).start()
        server = xllamacpp.Server(_parameters(weights, key))
        os.write(address, f"{server.listening_address}\n".encode())
        threading.Event().wait()


def _end_with(service: IO[bytes]) -> None:
    service.read()
    os._exit(0)  # at once: an answer under way has nobody left to read it


def _parameters(weights: str, key: str) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = weights
    params.model_alias = {"local"}  # what clients are told; else the file's path
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.api_keys = [key]  # other users of this machine, and pages in its browsers, reach loopback too
    params.ui = params.endpoint_slots = False
    params.n_ctx, params.n_parallel = CONTEXT_TOKENS * ANSWERS, ANSWERS
    params.n_predict, params.n_batch = MAX_ANSWER_TOKENS, BATCH_TOKENS
    params.cpuparams.n_threads = min(MAX_THREADS, os.cpu_count() or 1)
    params.cache_ram_mib = 0  # by default up to 8 GiB of earlier prompts are kept
    params.warmup = False  # takes longer than the first answer gains by it
    params.verbosity = 1  # errors alone, into the service's log
    # As the model's authors advise; without the penalty it often repeats one phrase until the limit.
    params.sampling.temp, params.sampling.top_p, params.sampling.penalty_repeat = 0.2, 0.9, 1.1
    return params


if __name__ == "__main__":
    main(sys.argv[1])
