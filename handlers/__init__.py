"""The service: one file per subject, with an async generator or a coroutine per route. ROUTES is the whole table."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from handlers import ag_ui, agent, ai_sdk, basics, chat, files, jobs, notifications, openai, ops, page, tasks
from handlers.chat import Model, open_model
from handlers.database import Tasks, open_tasks
from handlers.files import open_folder
from ssecore.http.routes import Route
from ssecore.settings import Settings

__all__ = ["ROUTES", "Resources", "resources"]

ROUTES: list[Route] = [
    *basics.ROUTES,
    *tasks.ROUTES,
    *agent.ROUTES,
    *ai_sdk.ROUTES,
    *ag_ui.ROUTES,
    *chat.ROUTES,
    *openai.ROUTES,
    *jobs.ROUTES,
    *notifications.ROUTES,
    *files.ROUTES,
    *ops.ROUTES,
    *page.ROUTES,
]


@dataclass(frozen=True, slots=True)
class Resources:
    """`request.state`."""

    settings: Settings
    tasks: Tasks
    model: Model
    files: Path


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Resources]:
    files_folder = await open_folder(settings.data_dir)
    async with open_tasks(settings.data_dir) as tasks_database, open_model(settings) as model:
        yield Resources(settings, tasks_database, model, files_folder)
