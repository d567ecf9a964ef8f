"""The history checker: short runs of its scenarios, and histories that it has to complain about."""

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest

from tests.history import RETENTION_EVENTS, Block, Connection, History, Publication, Reader, Script, violations
from tests.history.scenario import SCENARIOS, play
from tests.needs import needs
from tests.redis_server import Kind, serving

SEED = 20
RUN, TOPIC = "R" * 22, "T" * 22
SCRIPT = Script("steady", seed=1, events=3, pause_ms=0)


def check(name: str, log: Callable[[], AbstractContextManager[str]], **least: int) -> None:
    """Play for two seconds; on a busy machine, on which that comes to less than `least`, for longer."""
    for seconds in (2, 4, 8):
        with log() as where:
            history = play(SEED, seconds, SCENARIOS[name], where)
        found, counts = violations(history), history.counts()
        assert not found, "\n".join([f"seed {SEED}, {name}:", *found[:20]])
        assert counts["restarts"] or SCENARIOS[name] is None, counts
        if all(counts[what] > count for what, count in least.items()):
            return
    pytest.fail(f"too little has happened: {counts}")


@needs("time")
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_reader_hears_every_event_once(name: str) -> None:
    check(name, lambda: nullcontext("sqlite"), cuts=50, resumes=50, acknowledged=20)


@needs("time")
@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param("redis", "killed", marks=needs("redis")), pytest.param("valkey", "drained", marks=needs("valkey"))],
)
def test_every_reader_hears_every_event_once_from_redis(kind: Kind, name: str) -> None:
    @contextmanager
    def redis() -> Iterator[str]:
        with serving(kind) as server:
            yield server.url

    check(name, redis, resumes=10, acknowledged=10)


def run_blocks(*seqs: int) -> list[Block]:
    return [Block(f"{RUN}.{seq}", *SCRIPT.whole()[seq - 1]) for seq in seqs]


def topic_blocks(*seqs: int) -> list[Block]:
    return [Block(f"{TOPIC}.{seq}", "message", f'"{seq}"') for seq in seqs]


def good() -> History:
    """Two readers of a run, one of them cut after its second event; two of a topic, one of them away for too long."""
    kept = list(range(11, 11 + RETENTION_EVENTS))
    last = f"{RUN}.4"
    resumed = Connection(f"{RUN}.2", 200, RUN, run_blocks(3, 4), "end")
    cut = Connection("", 200, RUN, run_blocks(1, 2))
    over = Connection(last, 204, "", [], "end")
    gap = Block(None, "gap", '{"reason":"trimmed","from":6,"to":10}')
    init, pulse = Block(f"{TOPIC}.3", "init", "{}"), Block(None, "heartbeat", "")
    return History(
        runs={"run": SCRIPT},
        topics=["topic"],
        readers=[
            Reader("whole", "run", [Connection("", 200, RUN, run_blocks(1, 2, 3, 4), "end"), over], ended=True),
            Reader("cut", "run", [cut, resumed, copy.deepcopy(over)], ended=True),
            Reader(
                "steady", "topic", [Connection("", 200, "", [init, *topic_blocks(4, 5, *range(6, 11), *kept)])], True
            ),
            Reader(
                "sleepy",
                "topic",
                [
                    Connection("", 200, "", [init, pulse, *topic_blocks(4, 5)]),
                    Connection(f"{TOPIC}.5", 200, "", [gap, *topic_blocks(*kept)]),
                ],
                True,
            ),
        ],
        publications=[
            Publication("topic", "publisher", f'"{seq}"', f"{TOPIC}.{seq}", 202) for seq in range(1, kept[-1] + 1)
        ],
    )


def interrupted() -> History:
    """The server was stopped after the run's second event; its end is in another epoch."""
    history = good()
    history.stopped_by, history.restarts = signal.SIGKILL, 1
    end = Block(f"{'E' * 22}.3", "error", '{"error":"the service was stopped","code":"interrupted"}')
    history.readers[0].connections[0].blocks[2:] = [end]
    history.readers[1].connections[1].blocks[:] = [end]
    return history


def test_a_good_history_is_none_to_complain_about() -> None:
    assert violations(good()) == []
    assert violations(interrupted()) == []
    history = good()
    for reader in history.readers:
        for connection in reader.connections[:-1]:
            connection.blocks.insert(0, Block(connection.sent_id, "cut", None))
    assert violations(history) == []


def run_reader(history: History) -> Connection:
    """The connection that goes on after the second event."""
    return history.readers[1].connections[1]


def topic_reader(history: History) -> Connection:
    return history.readers[3].connections[1]


def duplicate(history: History) -> None:
    run_reader(history).blocks[:0] = run_blocks(2)


def duplicate_in_a_topic(history: History) -> None:
    topic_reader(history).blocks += topic_reader(history).blocks[-1:]


def cursor_that_was_not_sent(history: History) -> None:
    run_reader(history).blocks.insert(0, Block(f"{RUN}.3", "cut", None))


def cut_in_the_middle(history: History) -> None:
    run_reader(history).blocks.insert(1, Block(f"{RUN}.2", "cut", None))


def hole(history: History) -> None:
    del run_reader(history).blocks[0]


def hole_without_a_gap(history: History) -> None:
    del topic_reader(history).blocks[0]


def gap_too_small(history: History) -> None:
    topic_reader(history).blocks[0] = Block(None, "gap", '{"reason":"trimmed","from":6,"to":9}')


def gap_in_what_is_kept(history: History) -> None:
    topic_reader(history).blocks[:2] = [Block(None, "gap", '{"reason":"trimmed","from":6,"to":11}')]


def gap_in_a_run(history: History) -> None:
    run_reader(history).blocks[:1] = [Block(None, "gap", '{"reason":"trimmed","from":3,"to":3}')]


def end_that_its_run_is_not_known(history: History) -> None:
    gap = '{"reason":"expired","from":3,"to":null}'
    run_reader(history).blocks = [Block("end", "gap", gap)]


def end_that_its_run_is_not_known_in_data_only(history: History) -> None:
    gap = '{"type":"gap","reason":"expired","from":3,"to":null}'
    run_reader(history).blocks = [Block(None, None, gap), Block("end", None, "[DONE]")]


def other_bytes_for_one_id(history: History) -> None:
    run_reader(history).blocks[0] = run_reader(history).blocks[0]._replace(data="something else")


def other_id_for_one_event(history: History) -> None:
    run_reader(history).blocks[0] = run_reader(history).blocks[0]._replace(id=f"{'X' * 22}.3")


def not_what_the_run_says(history: History) -> None:
    for connection in (history.readers[0].connections[0], history.readers[1].connections[0]):
        connection.blocks[1] = connection.blocks[1]._replace(data="something else")


def event_without_an_id(history: History) -> None:
    run_reader(history).blocks[0] = run_reader(history).blocks[0]._replace(id=None)


def second_run_for_one_key(history: History) -> None:
    run_reader(history).run = "S" * 22


def run_without_its_end(history: History) -> None:
    for connection in (history.readers[0].connections[0], run_reader(history)):
        del connection.blocks[-1]


def reader_that_misses_the_end(history: History) -> None:
    del run_reader(history).blocks[-1]


def init_again(history: History) -> None:
    topic_reader(history).blocks.insert(0, Block(f"{TOPIC}.10", "init", "{}"))


def missing_acknowledged_publish(history: History) -> None:
    last = history.publications[-1]
    history.publications.append(Publication("topic", "publisher", '"lost"', f"{TOPIC}.{int(last.data[1:-1]) + 1}", 202))


def acknowledged_under_the_id_of_another(history: History) -> None:
    history.publications[-2].data, history.publications[-1].data = '"more"', '"less"'


def published_twice(history: History) -> None:
    for reader in history.readers[2:]:
        blocks = reader.connections[-1].blocks
        blocks.append(Block(f"{TOPIC}.{RETENTION_EVENTS + 11}", "message", blocks[-1].data))


def refused_and_there(history: History) -> None:
    history.publications[-1].id, history.publications[-1].status = None, 503


def never_ends(history: History) -> None:
    history.readers[1].ended = False
    del history.readers[1].connections[-1]


def gives_up(history: History) -> None:
    history.readers[1].connections.insert(1, Connection(f"{RUN}.2", 503, "", [], "end"))


def lost_for_no_reason(history: History) -> None:
    history.readers[1].connections[0].outcome = "lost"


def fault_of_the_server(history: History) -> None:
    history.faults.append("the server ended with 1 on SIGTERM")


@pytest.mark.parametrize(
    ("breaks", "complaint"),
    [
        (duplicate, "a duplicate: 2 where 3 comes next"),
        (duplicate_in_a_topic, "a duplicate"),
        (cursor_that_was_not_sent, "another cursor"),
        (cut_in_the_middle, "an id alone that isn't an opening"),
        (hole, "a hole: 4 where 3 comes next"),
        (hole_without_a_gap, "a hole: 11 where 6 comes next"),
        (gap_too_small, "a hole: 11 where 10 comes next"),
        (gap_in_what_is_kept, "a gap that doesn't explain the hole"),
        (gap_in_a_run, "a gap that can't be"),
        (end_that_its_run_is_not_known, "a gap that can't be"),
        (end_that_its_run_is_not_known_in_data_only, "it ends for good, at 2"),
        (other_bytes_for_one_id, "another content"),
        (other_id_for_one_event, "another content"),
        (not_what_the_run_says, "1 of 4 as planned"),
        (event_without_an_id, "without an id"),
        (second_run_for_one_key, "it is 2 runs"),
        (run_without_its_end, "3 of 4 as planned"),
        (reader_that_misses_the_end, "it ended at 3 of 4"),
        (init_again, "init again"),
        (missing_acknowledged_publish, "was acknowledged, and the readers ended at"),
        (acknowledged_under_the_id_of_another, "was acknowledged as"),
        (published_twice, "heard 2 times"),
        (refused_and_there, "nobody sent it"),
        (never_ends, "it never ended"),
        (gives_up, "an EventSource gives up: status 503"),
        (lost_for_no_reason, "lost, and the server was there"),
        (fault_of_the_server, "the server ended with 1"),
    ],
)
def test_a_broken_history_is_complained_about(breaks: Callable[[History], None], complaint: str) -> None:
    history = good()
    breaks(history)
    assert any(complaint in violation for violation in violations(history)), violations(history)


def test_an_interrupted_run_has_an_excuse_only_where_the_server_was_stopped() -> None:
    history = interrupted()
    history.stopped_by = None
    assert any("2 of 4 as planned" in violation for violation in violations(history))


def test_where_the_log_goes_away_a_run_may_end_by_it_and_a_refused_publish_may_be_there() -> None:
    history = interrupted()
    end = Block(f"{RUN}.3", "error", '{"error":"the event log can\'t be used","code":"log_unavailable"}')
    history.readers[0].connections[0].blocks[2:] = [end]
    history.readers[1].connections[1].blocks[:] = [end]
    refused_and_there(history)
    assert violations(history)
    history.log_goes = True
    assert violations(history) == []
    published_twice(history)
    assert any("heard 2 times" in violation for violation in violations(history))


def test_what_was_delivered_before_a_restart_must_still_be_there() -> None:
    history = interrupted()
    end = history.readers[1].connections[1].blocks[0]
    history.readers[1].connections[1].blocks[0] = end._replace(id=f"{'E' * 22}.2")  # the second event is gone
    assert any("a duplicate: 2 where 3 comes next" in violation for violation in violations(history))
