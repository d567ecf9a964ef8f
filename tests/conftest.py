import os

import pytest

import ssecore.stream
from tests.needs import find


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One backend unless a test asks for more: `@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])`."""
    return "asyncio"


@pytest.fixture
def long_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that count what travels together: on a busy machine a generator's turn could end in between."""
    monkeypatch.setattr(ssecore.stream, "TURN_S", 3600.0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        try:
            find(*mark.args)
        except LookupError as error:
            reason = str(error)
        else:
            continue
        if os.environ.get("SSEAPP_TEST_ALL") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
