"""A conformance suite for servers of resumable event streams, as docs/protocol.md describes them.

    python -m conformance http://localhost:8000/chat?prompt=hello

It needs Python and httpx, and imports nothing of `sseapp`: a mistake in our decoder can't hide one in our encoder, and
the folder can be copied next to any other server.
"""
