"""What a server holds under load, and afterwards. `python -m benchmarks soak frozen` is the same for long."""

import sys

import pytest

from benchmarks import frozen, soak
from tests.needs import needs

pytestmark = [needs("time"), pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]


def test_what_mixed_traffic_takes_is_given_back() -> None:
    rows = soak.measure(callers=30, seconds=2)
    after = rows[soak.AFTER]
    assert after["done"] > 30
    assert not after[soak.WRONG]
    assert not soak.more(rows), rows


def test_clients_that_never_read_hold_little_and_are_dropped() -> None:
    rows = frozen.measure(clients=150, readers=5, seconds=2)
    among, after = rows[frozen.AMONG], rows[frozen.AFTER]
    assert among["sockets"] == 150, "none is dropped before its time"
    assert among[frozen.GROWTH] < 0.25 * 150 + 5
    assert among[frozen.KERNEL] < 1.0 * 150, "SO_SNDBUF"
    assert among["events"] > 20, "the others are read to"
    assert after["sockets"] == 0
    assert after[frozen.KERNEL] < 10
