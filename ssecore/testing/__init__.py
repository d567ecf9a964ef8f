"""Drive an ASGI app in-process, for tests of yours as for ours; see `ssecore.testing.kit`."""

from ssecore.testing.kit import Exchange, Transport, VirtualClockLoop, assert_stream, connect, lifespan, opening

__all__ = ["Exchange", "Transport", "VirtualClockLoop", "assert_stream", "connect", "lifespan", "opening"]
