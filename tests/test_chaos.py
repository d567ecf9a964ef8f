"""A short run of `benchmarks chaos`: nginx, three replicas and a Redis, all of which break while many read."""

import os
import threading
from pathlib import Path

import pytest

from benchmarks.chaos import FAULTS, play
from benchmarks.history import violations
from benchmarks.process import busy
from tests.needs import needs

SEED = 1
SECONDS = 60


@needs("nginx")
@needs("redis")
def test_nobody_loses_or_repeats_anything_while_all_of_it_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    history = play(SEED, SECONDS, "redis")
    found, counts = violations(history), history.counts()
    with capsys.disabled():
        print(f"\nseed {SEED}, {SECONDS} s: " + ", ".join(f"{name} {number:,.0f}" for name, number in counts.items()))
    assert not found, "\n".join([f"seed {SEED}:", *found[:20]])
    assert sum(counts.get(fault, 0) for fault in FAULTS) > SECONDS / 3, counts
    assert counts["resumes"] > 200 and counts["events"] > 3000 and counts["acknowledged"] > 50, counts


def test_the_load_beside_it_ends_with_it() -> None:
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    before = set(children.read_text().split())
    with pytest.raises(ZeroDivisionError), busy(2, 60):
        load = set(children.read_text().split()) - before
        raise ZeroDivisionError
    assert len(load) == 2
    assert not load & set(children.read_text().split())
