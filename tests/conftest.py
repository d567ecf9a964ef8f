import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import settings

import ssecore.streaming.pump
from tests import upstream
from tests.lines import lines_offered
from tests.needs import find, for_test
from tests.upstream import Upstream

MANY_TESTS: Final = {f"test_{name}" for name in ("chat", "client", "conformance", "contract", "runs", "stream", "wire")}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One backend unless a test asks for more: `@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])`."""
    return "asyncio"


@pytest.fixture
def long_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that count what travels together: on a busy machine a generator's turn could end in between."""
    monkeypatch.setattr(ssecore.streaming.pump, "TURN_S", 3600.0)


@pytest.fixture(params=[False, True], ids=["waiting", "parked"])
def parked(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether streams are parked on lines, as under our runner; else each waits in its request's own task."""
    with lines_offered(request.param):
        yield request.param


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, for a test marked `@needs("tmpfs")`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run([find("tmpfs"), "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="module")
def shared_upstream() -> Iterator[Upstream]:
    """A model's server that answers as the test says, for all tests of a file."""
    with upstream.serve() as server:
        yield server


def pytest_configure(config: pytest.Config) -> None:
    """How long an example takes decides nothing. The first stage (`-m "not needs"`) tries fewer of them."""
    settings.register_profile("all", deadline=None)
    settings.register_profile("some", deadline=None, max_examples=30)
    settings.load_profile("some" if config.option.markexpr else "all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests need something take longest, and then some with many tests. They come first, so that all
    processes end together."""
    long = {item.path for item in items if item.get_closest_marker("needs")}
    items.sort(key=lambda item: (item.path not in long, item.path.stem not in MANY_TESTS))


def pytest_runtest_setup(item: pytest.Item) -> None:
    try:
        for_test({name for mark in item.iter_markers("needs") for name in mark.args})
    except LookupError as error:
        if os.environ.get("SSEAPP_TEST_ALL") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
