"""`python -m benchmarks [NAME …]`: run them, print a table each, write results/NAME.json, draw results/*.svg.

Every keyword of a benchmark's `run` is an option here.
"""

import argparse
import inspect
import sys
import traceback
from collections.abc import Callable
from time import monotonic

from benchmarks import (
    charts,
    churn,
    decode,
    durable,
    fanout,
    first_byte,
    frozen,
    idle,
    latency,
    memory,
    paced,
    redis,
    resume,
    retention,
    rows,
    soak,
    throughput,
    tokens,
)
from benchmarks.process import pin_load, raise_file_limit
from benchmarks.report import Report

BENCHMARKS: dict[str, Callable[..., Report]] = {
    "churn": churn.run,
    "decode": decode.run,
    "durable": durable.run,
    "fanout": fanout.run,
    "first_byte": first_byte.run,
    "frozen": frozen.run,
    "idle": idle.run,
    "latency": latency.run,
    "memory": memory.run,
    "paced": paced.run,
    "redis": redis.run,
    "resume": resume.run,
    "retention": retention.run,
    "rows": rows.run,
    "soak": soak.run,
    "throughput": throughput.run,
    "tokens": tokens.run,
}


def main() -> int:
    lines = [f"  {name:<12} {inspect.getdoc(run)}" for name, run in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["benchmarks:", *lines]),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; without one: all")
    defaults: dict[str, dict[str, object]] = {}
    for name, run in BENCHMARKS.items():
        for keyword, parameter in inspect.signature(run).parameters.items():
            defaults.setdefault(keyword, {})[name] = parameter.default
    for keyword, of in defaults.items():
        kind = type(next(iter(of.values())))
        parser.add_argument(
            f"--{keyword.replace('_', '-')}",
            type=_whole if kind is int else kind,
            metavar="N" if kind is int else "FILE",
            help=", ".join(f"{name}: {value:,}" if kind is int else name for name, value in of.items()),
        )
    options = vars(parser.parse_args())
    names = options.pop("names") or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}")
    pin_load()
    raise_file_limit()
    broken = []
    for name in names:
        given = {key: value for key, value in options.items() if value is not None and name in defaults[key]}
        began = monotonic()
        print(f"{name} …", flush=True)
        try:
            report = BENCHMARKS[name](**given)
        except Exception:  # the others are an hour's work
            traceback.print_exc()
            broken.append(name)
        else:
            took = f"written to {report.write()} after {monotonic() - began:.0f} s"
            print(report, took, sep="\n", end="\n\n", flush=True)
    print("drawn:", *charts.draw())
    if broken:
        print(f"broken off: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


def _whole(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
