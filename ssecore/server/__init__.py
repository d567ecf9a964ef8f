"""The server process: the command `sseapp` and its runner over uvicorn."""
