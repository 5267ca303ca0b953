"""What every request passes first: its length, once, its limit, and the key; and what a fault in the server says."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klfast.serving.metrics import Metrics
from klfast.serving.replies import failure

_OPEN = ("/health",)  # without a key


class Guard:
    """ASGI middleware that refuses requests without the key, with too many bytes or two lengths, and counts replies.

    An exception becomes a reply of status 500, and goes on to the log.

    Args:
        app: what the others reach.
        key: what clients must send as "Authorization: Bearer KEY"; None lets all in.
        most_bytes: of a request's body.
        paths: those to count by name.
        metrics: where to count.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, most_bytes: int, paths: Iterable[str], metrics: Metrics
    ) -> None:
        self._app, self._most, self._paths, self._metrics = app, most_bytes, frozenset(paths), metrics
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"
        headers, size, has_begun = dict(scope["headers"]), 0, False

        async def counted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._metrics.replies.labels(path, str(message["status"])).inc()
            await send(message)

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise HTTPException(413, self._too_large)
            return message

        refusal = None
        # compare_digest takes as long wherever the two differ, so that time tells nothing about the key.
        if self._expected is not None and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = failure("wrong or missing API key", "authentication_error", "invalid_api_key")
                refusal = JSONResponse(error, 401, {"WWW-Authenticate": "Bearer"})
        if refusal is None and int(headers.get(b"content-length", 0)) > self._most:  # h11 has seen that it is a number
            refusal = JSONResponse(failure(self._too_large, "invalid_request_error"), 413)
        if {b"content-length", b"transfer-encoding"} <= headers.keys():  # a proxy may have read the other than h11 does
            error = failure("a request has a Content-Length or a Transfer-Encoding, not both", "invalid_request_error")
            refusal = JSONResponse(error, 400, {"Connection": "close"})
        try:
            await (refusal or self._app)(scope, bounded, counted)
        except Exception as error:
            if not has_begun:
                reply = JSONResponse(failure(f"internal error: {type(error).__name__}", "server_error"), 500)
                await reply(scope, bounded, counted)
            raise

    @property
    def _too_large(self) -> str:
        return f"the request has more than {self._most} bytes"
