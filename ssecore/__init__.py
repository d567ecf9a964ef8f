"""The engine of sseapp: the event-stream format, the life of a stream, routes and requests. No service of its own."""

__all__ = ["__version__"]

__version__ = "0.2.0"
