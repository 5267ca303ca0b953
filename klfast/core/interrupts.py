"""Ctrl-C that never comes between a change and its undoing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Guard:
    """What is known of SIGINT while it is held back."""

    def __init__(self) -> None:
        self.handler: Callable | None = None  # what it does otherwise; None while nothing is held back
        self.is_open = False
        self.is_pending = False

    def receive(self, number: int, frame: object) -> None:
        if self.is_open:
            self.is_open = False  # what unwinds now is not interrupted again
            self.handler(number, frame)
        else:
            self.is_pending = True

    def deliver(self) -> None:
        if self.is_pending:
            self.is_pending = False
            self.handler(signal.SIGINT, None)


_guard = _Guard()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, except within ``interruptible``; so no undoing in it can be cut short.

    Only the main thread gets signals; in others, or where SIGINT has no Python handler, this does nothing.
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


class interruptible:
    """Let Ctrl-C through within this block of a ``deferred`` one: for long work that leaves nothing to undo."""

    def __enter__(self) -> None:
        self._is_ours = _guard.handler is not None and not _guard.is_open and _is_main()
        if self._is_ours:
            _guard.deliver()
            _guard.is_open = True

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            _guard.is_open = False
