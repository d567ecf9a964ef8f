"""The pump: an async generator at work, ahead of whoever takes what it gives.

Rules, cited by number at the code:

1.  One task makes every `anext` and the `aclose` of a generator. Anything else lets anyio's scopes be left in another
    order than they were entered.
2.  A cancellation reaches a generator once. Its `finally` may await, and has `CLOSE_S` for that; then it is cancelled
    again and again. (anyio's own cancellation comes at each await: connection pools leak, since they don't get to give
    back what they hold.) On asyncio the task is asyncio's own, and only this module cancels it; so it needs no cancel
    scope, which would cost each connection 0.9 KiB. On trio the
    cancellation comes at each await, as trio has it: there a `finally` that awaits shields itself.
3.  Whoever takes is told each time that the generator waits, and at its end: before the loop has its turn, so no other
    task's work stands between an event and its client.
4.  A generator that never waits gives the loop a turn when its buffer is full, and each `TURN_S`. The pump looks at the
    clock for that: at a write's first events, then after twice as many bytes each time, at last each `LOOK_BYTES`.
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

__all__ = ["CLOSE_S", "FIRST_ITEM_S", "EventPump", "GeneratorTask", "Pump"]

logger = logging.getLogger("sseapp")

#: How long an answer waits for its first event: what fails at once gets a real HTTP status.
FIRST_ITEM_S: Final = 1.0
#: Rule 2. What a generator may take to close.
CLOSE_S: Final = 5.0
#: Rule 2. How often it is cancelled after that.
CANCEL_EACH_S: Final = 0.1
#: Rule 4. How long a generator may work before the other streams have their turn.
TURN_S: Final = 0.01
#: Rule 4. Some ten events: a look at the clock takes a twentieth of the time that an event takes.
LOOK_BYTES: Final = 1024

T = TypeVar("T")


class GeneratorTask(Generic[T]):
    """The one task that iterates an async generator and closes it (rules 1 and 2)."""

    what = "a handler"  #: in messages

    def __init__(self, generator: AsyncIterator[T]) -> None:
        self.ended = False  #: nothing new will come
        self.failure: Exception | None = None
        self._generator = generator
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._begun = False
        self._closing: asyncio.TimerHandle | None = None
        self._scope: CancelScope | None = None  # on trio
        self._done: anyio.Event | None = None

    async def iterate(self) -> None:
        """Iterate the generator."""
        raise NotImplementedError

    def waits(self) -> None:
        """It is about to wait. Called often: once for each time."""

    def over(self) -> None:
        """It has ended, and is closed."""

    def start(self, tasks: TaskGroup | None) -> None:
        """`tasks`: where it works on trio. On asyncio it has a task of its own."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            assert tasks is not None, "on trio a task belongs to a group"
            self._done = anyio.Event()
            tasks.start_soon(self._work_on_trio)
        else:
            self._task = loop.create_task(self._work())

    def stop(self) -> None:
        """Cancel it; a second time it does nothing."""
        self._stopped = True
        if self._scope is not None:
            self._scope.cancel()
        elif self._begun and self._closing is None and self._task is not None and not self._task.done():
            self._close_in_time()
            self._task.cancel()

    async def closed(self) -> None:
        """Until the generator is closed. A cancellation of the caller's is raised then."""
        again: asyncio.CancelledError | None = None
        if self._done is not None:
            with CancelScope(shield=True):
                await self._done.wait()
        elif self._task is not None and not self._task.done():
            with CancelScope(shield=True):  # against anyio's cancellations; a server's `Task.cancel` comes through
                while not self._task.done():
                    try:
                        await asyncio.wait([self._task])
                    except asyncio.CancelledError as error:
                        again = error
        self._task = None  # it keeps the exception that ended it, whose traceback keeps whatever it came through
        if again is not None:
            try:
                raise again
            finally:
                del again

    async def _work(self) -> None:
        self._begun = True
        try:
            try:
                if not self._stopped:
                    await _watched(self.iterate(), self.waits)
            finally:
                self._close_in_time()
                try:
                    await self._aclose()
                finally:
                    if self._closing is not None:
                        self._closing.cancel()
        except BaseException as error:
            if not self._took(error):
                raise
        finally:
            self.ended = True
            self.over()

    async def _work_on_trio(self) -> None:
        # The outer one is shielded, so that `stop` is the only way to cancel it. The inner one is entered before the
        # first `anext`: a scope that is entered to close the generator would be left in another order than those that
        # are open in it.
        assert self._done is not None
        closing = CancelScope()
        try:
            self._scope = CancelScope(shield=True)
            if self._stopped:
                self._scope.cancel()
            with self._scope, closing:
                try:
                    await _watched(self.iterate(), self.waits)
                finally:
                    closing.shield, closing.deadline = True, current_time() + CLOSE_S
                    await self._aclose()
        except BaseException as error:
            if not self._took(error):
                raise
        finally:
            if closing.cancel_called:
                _log_unclosed(self.what)
            self.ended = True
            self.over()
            self._done.set()

    def _took(self, error: BaseException) -> bool:
        """Note it as the generator's failure: anything is, except a cancellation by `stop`."""
        if not isinstance(error, get_cancelled_exc_class()):
            self.failure = failure_of(error, self.what)
        elif not self._stopped:  # by a task that the generator waited for
            self.failure = RuntimeError(f"{self.what.replace('a ', 'the ', 1)} was cancelled from within")
        else:
            return False
        return True

    async def _aclose(self) -> None:
        aclose = getattr(self._generator, "aclose", None)
        if aclose is not None:
            await aclose()

    def _close_in_time(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(CLOSE_S, self._cut_short)

    def _cut_short(self, again: bool = False) -> None:
        if not again:
            _log_unclosed(self.what)
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._closing = asyncio.get_running_loop().call_later(CANCEL_EACH_S, self._cut_short, True)


def _log_unclosed(what: str) -> None:
    logger.warning("%s did not close within %s s and was cancelled again", what, CLOSE_S)


class Pump(GeneratorTask[T]):
    """Frames what a generator gives, and runs ahead of whoever takes it: at most `buffer_bytes` and one item.

    As it is it gives bytes; see `EventPump`.
    """

    events = False
    opening = b""
    first_s = FIRST_ITEM_S
    is_shared = False

    def __init__(
        self, generator: AsyncIterator[T], frame: Callable[[T], bytes], request: Request, *, buffer_bytes: int
    ) -> None:
        super().__init__(generator)
        self.events_sent = 0
        self.exhausted = False  #: the generator came to its own end
        self._frame = frame
        self._request = request
        self._limit = buffer_bytes
        self._frames: list[bytes] = []
        self._room: anyio.Event | None = None  # it waits until something is taken
        #: Called each time that it waits and there is something to take, and at its end (rule 3).
        self.told: Callable[[], None] | None = None

    # Whoever takes

    def begin(self, sender: Any, tasks: TaskGroup | None) -> None:
        """Work for a `Sender`."""
        self.told = sender.poke
        self.start(tasks)

    @property
    def has_something(self) -> bool:
        """Something to take, or the end."""
        return bool(self._frames) or self.ended

    @property
    def finished(self) -> bool:
        """Nothing is left to take, and nothing will come."""
        return self.ended and not self._frames

    def take(self) -> list[bytes]:
        """All that is there, each item by itself."""
        taken = self._frames.copy()
        self.events_sent += len(taken)
        self._frames.clear()
        if self._room is not None:
            self._room.set()
            self._room = None
        return taken

    def ready(self) -> bytes:
        """All that is there."""
        return b"".join(self.take())

    async def from_log(self) -> bytes:
        """Never asked for: `ready` has all there is."""
        return self.ready()

    def farewell(self, reason: EndReason | None) -> bytes:
        return b""

    def close(self) -> None:
        self.told = None

    # The generator's side

    def waits(self) -> None:
        # Not when it waits for room: `told` was called before, and a task of trio's can't be woken in this moment.
        if self._frames and self._room is None and self.told is not None:
            self.told()

    def over(self) -> None:
        if self.failure is not None:
            self.failure = http_error(self.failure) or self.failure
        if self.told is not None:
            self.told()

    async def iterate(self) -> None:
        """Hot path: an event costs one `anext`, one `frame`, one append."""
        frame, frames, limit, size = self._frame, self._frames, self._limit, 0
        look = step = 0  # rule 4, in bytes
        turn_ends = 0.0
        async for item in self._generator:
            try:
                framed = frame(item)
            except BaseException as error:
                self._request.end_for("failed")  # the generator is about to be closed, and will ask
                if isinstance(error, AttributeError) and not isinstance(item, Event):
                    raise TypeError(f"a handler yields Event objects, not {type(item).__name__}") from None
                raise
            if not frames or size >= look:
                if self._stopped:  # a generator that goes on after its cancellation
                    return
                # Before the append, so that the last item is still here when the generator ends without a wait.
                if frames and size >= limit:
                    if self.told is not None:
                        self.told()
                    if frames:
                        self._room = anyio.Event()
                        await self._room.wait()
                    else:
                        await checkpoint()
                    size = 0
                elif frames and monotonic() >= turn_ends:
                    await checkpoint()
                    step, turn_ends = 0, monotonic() + TURN_S
                if not frames:  # what was there has been taken: the loop has had its turn
                    size, step, turn_ends = 0, 0, monotonic() + TURN_S
                step = min(2 * step + 16, LOOK_BYTES)
                look = min(size + step, limit)
            frames.append(framed)
            size += len(framed)
        self.exhausted = not self._stopped  # one that returned because it was cancelled is not


class EventPump(Pump[Event]):
    """The source of a fleeting event stream. With `ends_for_good` its end carries `id: end`, which then gets a 204.

    The id stands in the last event, if that is still here when the generator ends; else in a block of its own.
    """

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
        failure = StreamTimeout("the stream's longest life is over") if reason == "timeout" else self.failure
        if failure is None:
            if not self._ends_for_good or not self.exhausted or self._marked:
                return b""
            by_event = self._request.from_browser and not self._request.dialect.only_json
            return CURSOR_EVENT + END_ID if by_event else END_ID
        frames = b"".join(error_frames(failure, self._request.dialect))
        return frames[:-1] + END_ID if self._ends_for_good else frames


@types.coroutine
def _watched(work: Coroutine[Any, Any, None], waits: Callable[[], None]) -> Generator[Any, Any, None]:
    """Await `work`. `waits` is called each time that it suspends, before the loop has its turn (rule 3).

    Budget: one Python frame for each suspension, none for an item that is there.
    """
    step: Callable[[Any], Any] = work.send
    value: Any = None
    try:
        while True:
            waits_for = step(value)
            waits()
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
        value = None  # else an exception's traceback would keep this frame, and the frame the exception
