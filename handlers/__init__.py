"""The service: one file per subject, each an async generator (or a coroutine) per route. The whole table is here."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from handlers import basics, chat, jobs, notifications, ops, tasks
from handlers.chat import Model, open_model
from handlers.tasks import Tasks, open_tasks
from ssecore.routes import Route
from ssecore.settings import Settings

__all__ = ["ROUTES", "Resources", "resources"]

ROUTES: list[Route] = [*basics.ROUTES, *tasks.ROUTES, *chat.ROUTES, *jobs.ROUTES, *notifications.ROUTES, *ops.ROUTES]


@dataclass(frozen=True, slots=True)
class Resources:
    """What handlers find in `request.state`."""

    settings: Settings
    tasks: Tasks
    model: Model
    files: Path  #: the folder of the files


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Resources]:
    """Open what the handlers need, and close it when the app stops."""
    async with open_tasks(settings.data_dir) as tasks_database, open_model(settings) as model:
        folder = settings.data_dir / "files"
        folder.mkdir(exist_ok=True)
        yield Resources(settings, tasks_database, model, folder)
