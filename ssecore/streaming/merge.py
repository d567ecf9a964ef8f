"""Merges async iterators."""

import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, overload

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream

from ssecore.streaming.pump import GeneratorTask, asyncio_loop

__all__ = ["merge"]

logger = logging.getLogger("sseapp")

S = TypeVar("S")
T = TypeVar("T")


class merge(Generic[T]):
    """Merges async iterators, in the order of arrival.

        async with merge(prices(), news()) as items:
            async for item in items:
                yield Event(item)

    Sources wait while `buffer` items wait. A source's exception is raised here and ends the others; with
    `failures=True` it becomes an item. Leaving the block closes every source, and waits.
    """

    @overload
    def __init__(self, *sources: AsyncIterator[T], buffer: int = 16) -> None: ...
    @overload
    def __init__(
        self: "merge[S | Exception]", *sources: AsyncIterator[S], buffer: int = 16, failures: bool
    ) -> None: ...
    def __init__(self, *sources: AsyncIterator[Any], buffer: int = 16, failures: bool = False) -> None:
        self._sources = sources
        self._failures = failures
        self._buffer = buffer
        self._tasks: TaskGroup | None = None  # on trio; a source's failure doesn't cancel it
        self._workers: list[_Worker[Any]] | None = None

    async def __aenter__(self) -> Self:
        to_us, self._items = anyio.create_memory_object_stream[tuple[T | None, Exception | None]](self._buffer)
        if asyncio_loop() is None:
            self._tasks = anyio.create_task_group()
            await self._tasks.__aenter__()
        with to_us:
            self._workers = [_Worker(source, to_us.clone()) for source in self._sources]
            for worker in self._workers:
                worker.start(self._tasks)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._items.close()
        workers = self._workers or []
        for worker in workers:
            worker.stop()
        try:
            for worker in workers:
                await worker.closed()
        finally:
            if self._tasks is not None:
                # Without the caller's exception, which the group would wrap.
                await self._tasks.__aexit__(None, None, None)

    def __aiter__(self) -> Self:
        if self._workers is None:
            raise RuntimeError("use `async with merge(...) as items`, so that the sources are closed")
        return self

    async def __anext__(self) -> T:
        try:
            item, error = await self._items.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
        if error is None:
            return item  # type: ignore[return-value]
        if self._failures:
            return error  # type: ignore[return-value]  # the overload says so
        raise error


class _Worker(GeneratorTask[T]):
    what = "a source"

    def __init__(self, source: AsyncIterator[T], to_us: MemoryObjectSendStream[Any]) -> None:
        super().__init__(source)
        self._to_us = to_us
        self._failure_sent = False

    async def iterate(self) -> None:
        try:
            async for item in self._generator:
                await self._to_us.send((item, None))
        except BaseException as error:
            if self._stopped or not self._store_failure(error):
                raise
            self._failure_sent = True
            with suppress(anyio.BrokenResourceError):  # the reader left meanwhile
                await self._to_us.send((None, self.failure))

    def on_end(self) -> None:
        self._to_us.close()
        failure = None if self._failure_sent else self.failure
        if failure is not None and not isinstance(failure, anyio.BrokenResourceError):
            logger.warning("a merged source failed while it was closed", exc_info=failure)
