"""Another thread that changes things in the middle of calls."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def results(call: Callable[[], Any], change: Callable[[int], object], seconds: float = 1.5) -> list[Any]:
    """Return what calls return while another thread calls ``change`` with 0, 1, 2, ...; raise what that raises.

    There are at least 10 calls, and 3 changes.
    """
    stop, changes = threading.Event(), 0
    failures: list[Exception] = []
    found: list[Any] = []

    def work() -> None:
        nonlocal changes
        try:
            while not stop.is_set():
                change(changes)
                changes += 1
        except Exception as error:  # noqa: BLE001 (raised in the test's thread)
            failures.append(error)

    thread, interval, end = threading.Thread(target=work), sys.getswitchinterval(), time.monotonic() + seconds
    sys.setswitchinterval(1e-4)
    thread.start()
    try:
        while not failures and (time.monotonic() < end or len(found) < 10 or changes < 3):
            found.append(call())
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]
    return found
