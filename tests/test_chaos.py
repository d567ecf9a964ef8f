"""Short runs of `tests.chaos`: everything breaks while many read."""

import os
import threading
from pathlib import Path

import pytest

from benchmarks.process import busy
from tests.chaos import FAULTS, Log, play
from tests.history import violations
from tests.needs import needs

SEED = 1


@needs("time")
@pytest.mark.parametrize(
    ("log", "seconds"),
    [pytest.param("redis", 60, marks=[needs("nginx"), needs("redis")]), ("sqlite", 20), ("memory", 10)],
)
def test_nobody_loses_or_repeats_anything_while_all_of_it_breaks(
    log: Log, seconds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    history = play(SEED, seconds, log)
    found, counts = violations(history), history.counts()
    with capsys.disabled():
        print(f"\nseed {SEED}, {log}, {seconds} s: {history.summary()}")
    assert not found, "\n".join([f"seed {SEED}, {log}:", *found[:20]])
    faults_per_s = {"redis": 1 / 3, "sqlite": 1 / 5, "memory": 1 / 10}
    assert sum(counts.get(fault, 0) for fault in FAULTS[log]) > seconds * faults_per_s[log], counts
    per_s = {"resumes": 3.5, "events": 50, "acknowledged": 0.8}
    assert all(counts[name] > seconds * least for name, least in per_s.items()), counts


def test_the_load_beside_it_ends_with_it() -> None:
    children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
    before = set(children.read_text().split())
    with pytest.raises(ZeroDivisionError), busy(2, 60):
        load = set(children.read_text().split()) - before
        raise ZeroDivisionError
    assert len(load) == 2
    assert not load & set(children.read_text().split())
