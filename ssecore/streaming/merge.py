"""Merges async iterators."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Generic, Self, TypeVar, overload

import anyio
from anyio.abc import TaskGroup
from anyio.streams.memory import MemoryObjectSendStream

from ssecore.streaming.pump import GeneratorTask, asyncio_loop

__all__ = ["Block", "merge"]

logger = logging.getLogger("sseapp")

S = TypeVar("S")
T = TypeVar("T")


class Block(Generic[T]):
    """`async with` starts and ends tasks; `async for` takes their items."""

    _tasks: TaskGroup | None = None  # on trio; a worker's failure doesn't cancel it
    _workers: Sequence[GeneratorTask[Any]] | None = None

    def _make_workers(self) -> Sequence[GeneratorTask[Any]]:
        raise NotImplementedError

    def _stop(self) -> None:
        for worker in self._workers or ():
            worker.stop()

    async def __aenter__(self) -> Self:
        if asyncio_loop() is None:
            self._tasks = await anyio.create_task_group().__aenter__()
        self._workers = self._make_workers()
        for worker in self._workers:
            worker.start(self._tasks)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop()
        try:
            for worker in self._workers or ():
                await worker.closed()
        finally:
            if self._tasks is not None:
                # Without the caller's exception, which the group would wrap.
                await self._tasks.__aexit__(None, None, None)

    def __aiter__(self) -> Self:
        if self._workers is None:
            raise RuntimeError(f"use `async with {type(self).__name__}(...) as items`, so that its work is ended")
        return self


class merge(Block[T]):
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

    def _make_workers(self) -> Sequence[GeneratorTask[Any]]:
        to_us, self._items = anyio.create_memory_object_stream[tuple[T | None, Exception | None]](self._buffer)
        with to_us:
            return [_Worker(source, to_us.clone()) for source in self._sources]

    def _stop(self) -> None:
        self._items.close()
        super()._stop()

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

    async def iterate(self) -> None:
        try:
            async for item in self._generator:
                await self._to_us.send((item, None))
        except BaseException as error:
            if self._stopped or not self._store_failure(error):
                raise
            failure, self.failure = self.failure, None
            with suppress(anyio.BrokenResourceError):  # the reader left meanwhile
                await self._to_us.send((None, failure))

    def on_end(self) -> None:
        self._to_us.close()
        if self.failure is not None and not isinstance(self.failure, anyio.BrokenResourceError):
            logger.warning("a merged source failed while it was closed", exc_info=self.failure)
