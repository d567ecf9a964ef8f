"""`python -m tests.history --seconds 60 --seed 1 --log sqlite`: each scenario for so long."""

import argparse
import sys

from tests.history import violations
from tests.history.scenario import SCENARIOS, play
from tests.redis_server import KINDS, serving


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.history")
    parser.add_argument("--seconds", type=float, default=60, help="for each scenario (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the runs, the readers and the cuts (default: 1)")
    parser.add_argument(
        "--log",
        default="sqlite",
        help="memory, sqlite, redis or valkey (a server of that kind is started), or a URL redis://… (default: sqlite)",
    )
    options = parser.parse_args()
    # What is in memory only is lost with the process.
    scenarios = {"cut": None} if options.log == "memory" else SCENARIOS
    failed = False
    for name, stopped_by in scenarios.items():
        if options.log in KINDS:
            with serving(options.log) as redis:
                history = play(options.seed, options.seconds, stopped_by, redis.url)
        else:
            history = play(options.seed, options.seconds, stopped_by, options.log)
        found = violations(history)
        failed = failed or bool(found)
        print(f"{name}, seed {options.seed}, {options.log}: {history.summary()}", flush=True)
        for violation in found[:20]:
            print(violation, file=sys.stderr)
        print(f"{len(found)} violations", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
