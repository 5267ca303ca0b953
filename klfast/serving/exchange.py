"""The reply to one request: at once, or event by event; cancelled when the client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from klfast.serving.answer import Answer, Piece
from klfast.serving.mailbox import Mailbox
from klfast.serving.replies import Envelope, Form, Json, Scored, failure, usage

_CLIENT_GONE = 499  # nginx's status; nobody reads it, but it is counted


class Exchange:
    """Brings answers into the form of a reply.

    Args:
        answers: which have been submitted; those to one prompt together.
        prompts: the number of prompts.
        mailbox: where their pieces arrive, by their numbers.
        form: of the reply.
        model: the name that the client asked for.
        with_scores: whether log probabilities were asked for.
    """

    def __init__(
        self, answers: Sequence[Answer], prompts: int, mailbox: Mailbox, form: Form, model: str, *, with_scores: bool
    ) -> None:
        self._answers, self._prompts, self._mailbox = answers, prompts, mailbox
        self._form, self._envelope, self._with_scores = form, Envelope(model, form), with_scores

    def usage(self) -> Json:
        """Return the tokens of the prompts and of what is written so far."""
        return usage(self._answers, self._prompts)

    def cancel(self) -> None:
        """Stop writing."""
        for answer in self._answers:
            answer.is_cancelled = True

    async def whole(self, request: Request) -> Response:
        """Return the reply when it is complete."""
        reply, gone = asyncio.create_task(self._whole()), asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await reply) if reply.done() else Response(status_code=_CLIENT_GONE)
        finally:
            reply.cancel()
            gone.cancel()
            self.cancel()

    async def _whole(self) -> Json:
        texts = ["" for _ in self._answers]
        scores: list[list[Scored]] = [[] for _ in self._answers]
        finishes = ["" for _ in self._answers]
        async for index, piece in self._mailbox.pieces(len(self._answers)):
            if piece.finish == "error":
                raise HTTPException(500, piece.error)
            texts[index] += piece.text
            scores[index] += _scored(piece)
            finishes[index] = piece.finish or ""
        choices = [
            self._form.whole(index, text, scores[index] if self._with_scores else None, finishes[index])
            for index, text in enumerate(texts)
        ]
        return self._envelope.whole(choices, self.usage())

    def stream(self, *, with_usage: bool) -> Response:
        """Return the reply as server-sent events."""
        return _Stream(self, self._events(with_usage))

    async def _events(self, with_usage: bool) -> AsyncIterator[str]:
        for index in range(len(self._answers)):
            if (first := self._form.first(index)) is not None:
                yield _event(self._envelope.part([first]))
        async for index, piece in self._mailbox.pieces(len(self._answers)):
            if piece.finish == "error":
                yield _event(failure(piece.error, "server_error"))
                return
            if (choice := self._part(index, piece)) is not None:
                yield _event(self._envelope.part([choice]))
        if with_usage:
            yield _event(self._envelope.part([], self.usage()))
        yield "data: [DONE]\n\n"

    def _part(self, index: int, piece: Piece) -> Json | None:
        if not (piece.text or piece.scores or piece.finish):
            return None
        return self._form.part(index, piece.text, _scored(piece) or None, piece.finish)


def _scored(piece: Piece) -> list[Scored]:
    return [] if piece.scores is None else [Scored(piece.scores, piece.offset)]


class _Stream(StreamingResponse):
    """Events that stop being made when they are no longer read, even before the first."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
