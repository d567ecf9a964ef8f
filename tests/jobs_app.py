"""The service, whose reports read one page of the tasks and then wait, for servers that are killed."""

import threading
from collections.abc import Generator

from handlers.database import Tasks
from sseapp import SSEApp, create_app


def make() -> SSEApp:
    scan = Tasks.scan

    def first_page(self: Tasks) -> Generator[tuple[int, int, list[bytes]], None, None]:
        yield next(scan(self))
        threading.Event().wait()

    Tasks.scan = first_page  # type: ignore[method-assign]
    return create_app()
