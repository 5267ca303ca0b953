"""Work spread over processes: compilers take most of it, and the one of Intel's CPU runtime crashes now and then."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

WORKERS = min(os.cpu_count() or 1, 8)  # of about 1.5 GB each
CRASHES = 3  # before giving up

T = TypeVar("T")


def each(function: Callable[[int], T], count: int) -> Iterator[T]:
    """What a function gives of 0, 1 ... count - 1, in that order; what a crash took away is done again."""
    done = crashes = 0
    while done < count:
        with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
            try:
                for result in pool.map(function, range(done, count)):
                    yield result
                    done += 1
            except BrokenProcessPool:
                crashes += 1
                if crashes > CRASHES:
                    raise
                print("A compiler crashed; going on in new processes", flush=True)
