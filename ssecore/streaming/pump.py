"""The pump: iterates an async generator, ahead of the sender.

1.  One task makes every `anext` of a generator and its `aclose`, so that anyio's scopes are left in order.
2.  A generator is cancelled once, and may await in its `finally` for `CLOSE_S`; then repeatedly. (anyio cancels at each
    await: connection pools leak connections.) On asyncio only this module cancels the task, without a cancel scope,
    which would cost 0.9 KiB. On trio a `finally` that awaits must shield itself.
3.  `on_ready` is called before the generator waits and at its end, before other tasks run.
4.  A generator that never waits pauses when its buffer is full, and each `TURN_S`. The clock is read at a write's first
    events, then after twice as many bytes each time, up to `LOOK_BYTES`.
"""

import asyncio
import logging
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from time import monotonic
from typing import Any, Final, Generic, TypeVar

import anyio
from anyio import CancelScope, current_time, get_cancelled_exc_class
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from ssecore.dialects import CURSOR_EVENT, END_ID, error_frames, failure_of
from ssecore.errors import StreamTimeout
from ssecore.http.request import EndReason, Request
from ssecore.http.responses import http_error
from ssecore.wire import Event, encode

__all__ = ["CLOSE_S", "FIRST_ITEM_S", "EventPump", "GeneratorTask", "Pump", "asyncio_loop"]

logger = logging.getLogger("sseapp")

#: A failure before the first event gets its HTTP status.
FIRST_ITEM_S: Final = 1.0
CLOSE_S: Final = 5.0
CANCEL_EACH_S: Final = 0.1
TURN_S: Final = 0.01
#: About ten events: reading the clock takes a twentieth of an event.
LOOK_BYTES: Final = 1024

T = TypeVar("T")


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The running loop; `None` on trio."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class GeneratorTask(Generic[T]):
    """Iterates an async generator and closes it (rules 1 and 2)."""

    what = "a handler"

    def __init__(self, generator: AsyncIterator[T]) -> None:
        self.ended = False
        self.failure: Exception | None = None
        self._generator = generator
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._started = False
        self._close_timer: asyncio.TimerHandle | None = None
        self._scope: CancelScope | None = None  # on trio
        self._done: anyio.Event | None = None

    async def iterate(self) -> None:
        raise NotImplementedError

    def on_wait(self) -> None:
        """Called before the generator waits."""

    def on_end(self) -> None:
        """Called at its end."""

    def start(self, tasks: TaskGroup | None) -> None:
        if (loop := asyncio_loop()) is not None:
            self._task = loop.create_task(self._work())
        else:
            assert tasks is not None, "on trio a task belongs to a group"
            self._done = anyio.Event()
            tasks.start_soon(self._work_on_trio)

    def stop(self) -> None:
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()
        elif self._started and self._close_timer is None and self._task is not None and not self._task.done():
            self._start_close_timer()
            self._task.cancel()

    async def closed(self) -> None:
        """Wait for its end, even if the caller is cancelled."""
        again: asyncio.CancelledError | None = None
        if self._done is not None:
            with CancelScope(shield=True):
                await self._done.wait()
        elif self._task is not None and not self._task.done():
            with CancelScope(shield=True):  # doesn't stop a server's `Task.cancel`
                while not self._task.done():
                    try:
                        await asyncio.wait([self._task])
                    except asyncio.CancelledError as error:
                        again = error
        self._task = None  # its exception's traceback refers to frames
        if again is not None:
            try:
                raise again
            finally:
                del again

    async def _work(self) -> None:
        self._started = True
        try:
            try:
                if not self._stopped:
                    await _watched(self.iterate(), self.on_wait)
            finally:
                try:
                    await _watched(self._aclose(), self._start_close_timer)
                finally:
                    if self._close_timer is not None:
                        self._close_timer.cancel()
        except BaseException as error:
            if not self._store_failure(error):
                raise
        finally:
            self.ended = True
            self.on_end()

    async def _work_on_trio(self) -> None:
        # Only `stop` cancels the outer scope. The inner one, entered later, would be left before the generator's.
        assert self._done is not None
        closing = CancelScope()
        try:
            self._scope = CancelScope(shield=True)
            if self._stopped:
                self._scope.cancel()
            with self._scope, closing:
                try:
                    await _watched(self.iterate(), self.on_wait)
                finally:
                    closing.shield, closing.deadline = True, current_time() + CLOSE_S
                    await self._aclose()
        except BaseException as error:
            if not self._store_failure(error):
                raise
        finally:
            if closing.cancel_called:
                _log_unclosed(self.what)
            self.ended = True
            self.on_end()
            self._done.set()

    def _store_failure(self, error: BaseException) -> bool:
        """False for a cancellation by `stop`."""
        if not isinstance(error, get_cancelled_exc_class()):
            self.failure = failure_of(error, self.what)
        elif not self._stopped:
            self.failure = RuntimeError(f"{self.what.replace('a ', 'the ', 1)} was cancelled from within")
        else:
            return False
        return True

    async def _aclose(self) -> None:
        aclose = getattr(self._generator, "aclose", None)
        if aclose is not None:
            await aclose()

    def _start_close_timer(self) -> None:
        if self._close_timer is None:
            self._close_timer = asyncio.get_running_loop().call_later(CLOSE_S, self._cancel_again)

    def _cancel_again(self, logged: bool = False) -> None:
        if not logged:
            _log_unclosed(self.what)
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._close_timer = asyncio.get_running_loop().call_later(CANCEL_EACH_S, self._cancel_again, True)


def _log_unclosed(what: str) -> None:
    logger.warning("%s did not close within %s s and was cancelled again", what, CLOSE_S)


class Pump(GeneratorTask[T]):
    """A source of bytes, at most `buffer_bytes` and one item ahead of the sender."""

    events = False
    opening = b""
    first_s = FIRST_ITEM_S
    is_shared = False

    def __init__(
        self, generator: AsyncIterator[T], frame: Callable[[T], bytes], request: Request, *, buffer_bytes: int
    ) -> None:
        super().__init__(generator)
        self.events_sent = 0
        self.exhausted = False  #: ended by itself
        self._frame = frame
        self._request = request
        self._limit = buffer_bytes
        self._frames: list[bytes] = []
        self._room: anyio.Event | None = None
        #: Rule 3.
        self.on_ready: Callable[[], None] | None = None

    def begin(self, sender: Any, tasks: TaskGroup | None) -> None:
        self.on_ready = sender.poke
        self.start(tasks)

    @property
    def has_something(self) -> bool:
        return bool(self._frames) or self.ended

    @property
    def finished(self) -> bool:
        return self.ended and not self._frames

    def take(self) -> list[bytes]:
        taken = self._frames.copy()
        self.events_sent += len(taken)
        self._frames.clear()
        if self._room is not None:
            self._room.set()
            self._room = None
        return taken

    def ready(self) -> bytes:
        return b"".join(self.take())

    async def from_log(self) -> bytes:
        return self.ready()

    def farewell(self, reason: EndReason | None) -> bytes:
        return b""

    def close(self) -> None:
        self.on_ready = None

    def on_wait(self) -> None:
        # Not for room: it was called before, and here trio can't wake a task.
        if self._frames and self._room is None and self.on_ready is not None:
            self.on_ready()

    def on_end(self) -> None:
        if self.failure is not None:
            self.failure = http_error(self.failure) or self.failure
        if self.on_ready is not None:
            self.on_ready()

    async def iterate(self) -> None:
        """Hot path: one `anext`, one `frame`, one append."""
        frame, frames, limit, size = self._frame, self._frames, self._limit, 0
        look = step = 0  # rule 4
        turn_ends = 0.0
        async for item in self._generator:
            try:
                framed = frame(item)
            except BaseException as error:
                self._request.end_for("failed")
                if isinstance(error, AttributeError) and not isinstance(item, Event):
                    raise TypeError(f"a handler yields Event objects, not {type(item).__name__}") from None
                raise
            if not frames or size >= look:
                if self._stopped:  # it ignored its cancellation
                    return
                # Before the append, so that the last item is here if the generator ends.
                if frames and size >= limit:
                    if self.on_ready is not None:
                        self.on_ready()
                    if frames:
                        self._room = anyio.Event()
                        await self._room.wait()
                    else:
                        await checkpoint()
                    size = 0
                elif frames and monotonic() >= turn_ends:
                    await checkpoint()
                    step, turn_ends = 0, monotonic() + TURN_S
                if not frames:
                    size, step, turn_ends = 0, 0, monotonic() + TURN_S
                step = min(2 * step + 16, LOOK_BYTES)
                look = min(size + step, limit)
            frames.append(framed)
            size += len(framed)
        self.exhausted = not self._stopped


class EventPump(Pump[Event]):
    """A fleeting event stream. With `ends_for_good` its last event, or a block behind it, has `id: end`."""

    events = True

    def __init__(
        self, generator: AsyncIterator[Event], request: Request, *, buffer_bytes: int, ends_for_good: bool
    ) -> None:
        super().__init__(generator, encode, request, buffer_bytes=buffer_bytes)
        self._ends_for_good = ends_for_good
        self._marked = False

    async def iterate(self) -> None:
        await super().iterate()
        if self.exhausted and self._ends_for_good and self._frames:
            self._frames[-1] = self._frames[-1][:-1] + END_ID
            self._marked = True

    def farewell(self, reason: EndReason | None) -> bytes:
        if reason == "drain":
            return b""
        failure = StreamTimeout("the stream reached its longest duration") if reason == "timeout" else self.failure
        if failure is None:
            if not self._ends_for_good or not self.exhausted or self._marked:
                return b""
            by_event = self._request.from_browser and not self._request.dialect.only_json
            return CURSOR_EVENT + END_ID if by_event else END_ID
        frames = b"".join(error_frames(failure, self._request.dialect))
        return frames[:-1] + END_ID if self._ends_for_good else frames


@types.coroutine
def _watched(work: Coroutine[Any, Any, None], on_wait: Callable[[], None]) -> Generator[Any, Any, None]:
    """Await `work`; calls `on_wait` before each suspension (rule 3), which costs one Python frame."""
    step: Callable[[Any], Any] = work.send
    value: Any = None
    try:
        while True:
            waits_for = step(value)
            on_wait()
            try:
                step, value = work.send, (yield waits_for)
            except GeneratorExit:
                work.close()
                raise
            except BaseException as thrown:
                step, value = work.throw, thrown
    except StopIteration:
        return
    finally:
        value = None  # breaks a reference cycle with an exception
