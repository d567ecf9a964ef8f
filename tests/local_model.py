"""A real language model as the upstream, for tests where an answer's words don't matter: one for the whole run.

    from tests import local_model
    model = local_model.model       # the fixture: the variables that make a service use it

    @needs("local-model")
    def test_a_chat_streams(tmp_path: Path, model: Mapping[str, str]) -> None:
        with serve(tmp_path, env=model) as server: ...

It writes some 60 tokens a second, two answers at once, each of 512 tokens at most: ask for something short. For faults
there is upstream.py.
"""

from collections.abc import Iterator, Mapping

import pytest
from anyio.from_thread import start_blocking_portal

from handlers.local_model import local_model

__all__ = ["model"]


@pytest.fixture(scope="session")
def model() -> Iterator[Mapping[str, str]]:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(local_model()) as (url, key):
        yield {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": key}
