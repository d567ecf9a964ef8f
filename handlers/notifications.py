"""Topics: one program publishes, and every subscriber receives."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from ssecore.errors import BadRequest, Forbidden, TooLarge
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import GET, POST
from ssecore.topics import Subscription
from ssecore.wire import Event

__all__ = ["ROUTES"]

#: Times `max_body_bytes`. Each line break adds six bytes, `data: `, so a body of line breaks would grow sevenfold.
MAX_GROWTH: Final = 2
#: The log stores the name with each stream.
MAX_NAME = 200


class Publication(msgspec.Struct, forbid_unknown_fields=True):
    event: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[^\r\n\x00]+\Z")] = "message"


async def user_stream(request: Request, user_id: str) -> Subscription:
    """Read a user's notifications and messages, with a `heartbeat` event every 5 seconds."""
    if request.caller not in (None, user_id):
        raise Forbidden(f"you are {request.caller}, and can't read the stream of another user")
    return Subscription(
        f"users/{_checked(user_id)}",
        Event({"status": "connected"}, "init"),
        pulse=lambda: Event({"time": datetime.now(UTC)}, "heartbeat"),
    )


async def notify(request: Request, user_id: str) -> Response:
    """Send a user a notification."""
    return JSON({"id": await _publish(request, f"users/{_checked(user_id)}", "notification")}, status=202)


async def message(request: Request, user_id: str) -> Response:
    """Send a user a message."""
    return JSON({"id": await _publish(request, f"users/{_checked(user_id)}", "message")}, status=202)


async def topic(request: Request, name: str) -> Subscription:
    """Read a topic."""
    return Subscription(f"topics/{_checked(name)}", Event({"topic": name}, "init"))


async def publish(request: Request, name: str) -> Response:
    """Publish to a topic."""
    topic = f"topics/{_checked(name)}"
    id = await _publish(request, topic, request.query.event)
    return JSON({"id": id, "subscribers": request.topics.subscribers(topic)}, status=202)


async def _publish(request: Request, topic: str, event: str) -> str:
    # As posted: the request was checked to be JSON.
    data = request.raw_body.strip()
    breaks = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
    max_bytes = MAX_GROWTH * request.runs.settings.max_body_bytes
    size = len(data) + breaks * len(b"data: ")
    if size > max_bytes:
        raise TooLarge(
            f"with its {breaks} line breaks the event would have {size} bytes, and {max_bytes} are allowed: "
            "send the JSON without white space between its values"
        )
    return str(await request.topics.publish(topic, Event(data, event)))


def _checked(name: str) -> str:
    if len(name) > MAX_NAME or not name.isprintable():
        raise BadRequest(f"a name must have at most {MAX_NAME} characters, all of them printable", field="name")
    return name


ROUTES = [
    GET("/users/{user_id}/stream", user_stream),
    POST("/users/{user_id}/notifications", notify, body=Any, publishes=True, may="publish:users/{user_id}"),
    POST("/users/{user_id}/messages", message, body=Any, publishes=True, may="publish:users/{user_id}"),
    GET("/topics/{name}", topic, may="subscribe:topics/{name}"),
    POST("/topics/{name}", publish, body=Any, query=Publication, publishes=True, may="publish:topics/{name}"),
]
