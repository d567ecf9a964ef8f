"""The service, whose log keeps a topic without events for a moment only."""

import sseapp
import ssecore.log
from sseapp import SSEApp

#: Seconds, not minutes: it has to pass in a test.
EMPTY_TOPIC_S = 1.0


def make() -> SSEApp:
    ssecore.log.facts.EMPTY_TOPIC_S = EMPTY_TOPIC_S  # type: ignore[misc]
    return sseapp.create_app()
