"""Work in processes: most of it is compilation, and the compiler of Intel's CPU runtime sometimes crashes or hangs."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

WORKERS = min(os.cpu_count() or 1, 8)  # of about 1.5 GB each
CRASHES = 6  # before giving up
LIMIT = 300.0  # seconds for one piece of work; some take half a minute

T = TypeVar("T")


def each(function: Callable[[int], T], count: int, limit: float = LIMIT) -> Iterator[T]:
    """Yield a function of 0, 1 ... count - 1 in order; calls lost to a crash or to ``limit`` seconds are repeated."""
    done = crashes = 0
    while done < count:
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            try:
                for result in pool.map(functools.partial(_limited, function, limit), range(done, count)):
                    yield result
                    done += 1
            except BrokenProcessPool:
                crashes += 1
                if crashes > CRASHES:
                    raise
                print("A compiler crashed or hung; going on in new processes", flush=True)


def _limited(function: Callable[[int], T], limit: float, index: int) -> T:
    """Return ``function(index)``; a process that hangs in it is ended, as by a crash."""
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        return function(index)
    finally:
        faulthandler.cancel_dump_traceback_later()
