"""Ctrl-C that cannot interrupt the undoing of a change."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Guard:
    """State of SIGINT while it is deferred."""

    def __init__(self) -> None:
        self.handler: Callable[[int, FrameType | None], object] | None = None  # the usual one; None unless deferred
        self.is_open = False
        self.is_pending = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_open and self.handler is not None:
            self.is_open = False  # a second Ctrl-C must not interrupt the unwinding
            self.handler(number, frame)
        else:
            self.is_pending = True

    def deliver(self) -> None:
        if self.is_pending and self.handler is not None:
            self.is_pending = False
            self.handler(signal.SIGINT, None)


_guard = _Guard()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, except within ``interruptible``, so that it cannot cut an undo short.

    Does nothing outside the main thread, which alone receives signals, or where SIGINT has no Python handler.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not _is_main() or not callable(handler) or _guard.handler is not None:
        yield
        return
    _guard.handler, _guard.is_open, _guard.is_pending = handler, False, False
    failed = True
    try:
        signal.signal(signal.SIGINT, _guard.receive)
        yield
        failed = False
    finally:
        signal.signal(signal.SIGINT, handler)
        is_pending, _guard.handler = _guard.is_pending, None
        if is_pending and not failed:
            handler(signal.SIGINT, None)


class interruptible:  # noqa: N801 (a context manager in lower case, like contextlib.suppress)
    """Let Ctrl-C through in this part of a ``deferred`` block: for long work that leaves nothing to undo."""

    def __enter__(self) -> None:
        self._is_ours = _guard.handler is not None and not _guard.is_open and _is_main()
        if self._is_ours:
            _guard.deliver()
            _guard.is_open = True

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            _guard.is_open = False
