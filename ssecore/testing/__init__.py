"""Tools to test an ASGI app in-process."""

from ssecore.testing.kit import Exchange, Transport, VirtualClockLoop, assert_stream, connect, lifespan, opening

__all__ = ["Exchange", "Transport", "VirtualClockLoop", "assert_stream", "connect", "lifespan", "opening"]
