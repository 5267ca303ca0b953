"""Pieces on their way from the scheduler's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from klfast.serving.answer import Piece


class Mailbox:
    """Takes pieces of several answers from any thread; made and read in the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def slot(self, index: int) -> Callable[[Piece], None]:
        """Return what delivers the pieces of one answer."""

        def deliver(piece: Piece) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return deliver

    async def pieces(self, answers: int) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (answer, piece) as they come, until so many answers have ended."""
        while answers:
            index, piece = await self._queue.get()
            answers -= piece.finish is not None
            yield index, piece
