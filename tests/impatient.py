"""`sseapp` with clocks of a second for a head, a body and an idle connection: for tests that stop its process."""

import sys

from ssecore.http import request
from ssecore.server import protocol
from ssecore.server import runner as server
from ssecore.server.cli import main

if __name__ == "__main__":
    protocol.HEAD_S = 1.0
    server.KEEP_ALIVE_S = 1
    request.BODY_TIMEOUT_S = 1.0  # type: ignore[misc]
    sys.exit(main())
