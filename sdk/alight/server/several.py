"""Several answers to one request, generated side by side and read as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import TypeAlias

from fastapi import Request

from alight.server.failures import ClientGone
from alight.server.stream import AHEAD, Answer, Answers, Begin
from alight.target import Chunk

AT_ONCE = 8  # of one request; its others wait

_Item: TypeAlias = "tuple[int, Chunk] | Exception | None"


class Several:
    """The chunks of several answers, each with the number of its answer. Use it in a `with` block.

    (They are read all the time, whichever comes first: were one left waiting until another has begun, it might
    hold the place in the engine that the other waits for.)
    """

    def __init__(self) -> None:
        self._only: Answer | None = None  # one alone needs no queue
        self._queue: asyncio.Queue[_Item] = asyncio.Queue(AHEAD)
        self._all: asyncio.Task[None] | None = None
        self._first: _Item = None

    @classmethod
    async def start(cls, answers: Answers, request: Request, model: str, begins: Sequence[Begin]) -> Several:
        """Begin, and wait for the first chunk of any of them: what fails before is raised here."""
        several = cls()
        if len(begins) == 1:
            several._only = await answers.start(request, model, begins[0])
            return several
        places = asyncio.Semaphore(AT_ONCE)

        async def one(index: int, begin: Begin) -> None:
            async with places:
                answer = await answers.start(request, model, begin)
                with answer:
                    async for chunk in answer:
                        await several._queue.put((index, chunk))

        async def run() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, begin in enumerate(begins):
                        group.create_task(one(index, begin))
            except ExceptionGroup as errors:  # the first ended the others
                await several._queue.put(errors.exceptions[0])
            else:
                await several._queue.put(None)

        several._all = asyncio.create_task(run())
        try:
            several._first = await several._next()
        except BaseException:
            several.close()
            raise
        return several

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        if self._only:
            async for chunk in self._only:
                yield 0, chunk
        item = self._first
        while isinstance(item, tuple):
            yield item
            item = await self._next()

    def close(self) -> None:
        """End them all."""
        if self._only:
            self._only.cancel(ClientGone())
        if self._all:
            self._all.cancel()

    def __enter__(self) -> Several:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _next(self) -> _Item:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item
