"""The streams of handlers/basics.py and nothing else, for servers that don't carry the whole service."""

from handlers.basics import ROUTES
from sseapp import Settings, SSEApp

app = SSEApp(ROUTES, Settings(log="memory"))
