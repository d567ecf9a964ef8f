"""The process: the command `sseapp`, its runner over uvicorn, signals and logs."""
