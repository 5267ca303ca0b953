"""A line on standard error for each request."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from klfast.core.errors import printable


class RequestLog:
    """ASGI middleware that says who asked for what, the status, tokens and seconds; never texts, keys or queries.

    The line comes when the reply has ended. Its tokens are those of ``usage`` in the request's state, if it has one.

    Args:
        app: what answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, state = time.perf_counter(), 500, scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            parts = [(scope.get("client") or ("-",))[0], scope["method"], scope["path"], str(status)]
            if usage := state.get("usage"):
                found = usage()
                parts.append(f"{found['prompt_tokens']} prompt tokens, {found['completion_tokens']} new,")
            parts.append(f"{time.perf_counter() - begun:.3f} s")
            with suppress(OSError, ValueError):  # nobody reads standard error any more
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(' '.join(parts))}", file=sys.stderr, flush=True)
