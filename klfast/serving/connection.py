"""``Connection``: HTTP/1.1 with one client, who must neither dawdle nor stop reading; ``http_server`` makes them."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from klfast.serving.replies import failure

PATIENCE = 60.0  # seconds
MOST_CONNECTIONS = 4096


def http_server(
    app: FastAPI, *, port: int = 0, patience: float = PATIENCE, most_connections: int = MOST_CONNECTIONS
) -> uvicorn.Server:
    """Return a server of the application, which speaks HTTP/1.1 by h11, whatever else is installed.

    h11 follows the standard's grammar to the letter, and refuses what two servers could read differently.

    Args:
        app: what answers.
        port: of 127.0.0.1, if the server is run without a socket.
        patience: longest time for a request to arrive whole, and for a client to read something, in seconds.
        most_connections: at a time; more are refused with status 503.
    """
    made = functools.partial(Connection, patience=patience, most_connections=most_connections)
    return _Server(
        uvicorn.Config(
            app,
            port=port,
            http=made,  # type: ignore[arg-type]  # uvicorn calls it, no more
            ws="none",
            proxy_headers=False,
            log_level="error",  # a warning for each request that is not HTTP would fill a disk
            access_log=False,
        )
    )


class _Server(uvicorn.Server):
    """Ends at once on any second signal; uvicorn's own server does so on a second Ctrl-C only."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


class Connection(H11Protocol):
    """Gives requests and readers a limited time, and answers what is not HTTP in the form of all other errors.

    Args:
        patience: see ``http_server``.
        most_connections: see ``http_server``.
        options: uvicorn's.
    """

    def __init__(self, *, patience: float, most_connections: int, **options: Any) -> None:
        super().__init__(**options)
        self._patience, self._most = patience, most_connections
        self._arrival = _Deadline(self.loop)  # of a request
        self._reading = _Deadline(self.loop)  # for the client to read something

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that all that is unread pauses writing
        if len(self.connections) > self._most:
            self._refuse(503, "too many connections; try again later")
        else:
            self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request, and see whether it is whole by now."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._wait_for_request()

    def on_response_complete(self) -> None:
        """Go on with the next request, of which some may be here already."""
        super().on_response_complete()
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._arrival.stop()
        self._reading.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Note that the client has read everything."""
        self._reading.stop()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self._refuse(400, msg)

    def _wait_for_request(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._arrival.stop()
        elif not self._arrival.is_set:
            self._arrival.start(self._patience, self._late)

    def _late(self) -> None:
        self._refuse(408, f"the request did not arrive within {self._patience:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        """Answer if nothing has been answered yet, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            kind = "server_error" if status >= 500 else "invalid_request_error"
            body = json.dumps(failure(message, kind)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            parts = [self.conn.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage())]
            self.transport.write(b"".join(part or b"" for part in parts))
        if self.cycle is not None:  # its application learns that nobody waits
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _wait_for_reader(self) -> None:
        unread = self.transport.get_write_buffer_size()
        self._reading.start(self._patience, lambda: self._unread(unread))

    def _unread(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._wait_for_reader()
        else:
            self.transport.abort()


class _Deadline:
    """Calls something at a time to come, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        return self._timer is not None

    def start(self, seconds: float, call: Callable[[], None]) -> None:
        self._timer = self._loop.call_later(seconds, call)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
