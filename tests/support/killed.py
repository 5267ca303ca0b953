"""Work in a forked process that is killed, or stays until it is."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def killed(work: Callable[[Callable[[], None]], object]) -> None:
    """Do work in a forked process, which ends by SIGKILL: ``work`` gets a function that kills its process."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            work(kill)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@contextmanager
def process(enter: Callable[[], object]) -> Iterator[int]:
    """Call ``enter`` in a forked process, which then sleeps; yield its id, and kill it in the end."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            enter()
            os.write(told, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(heard, 1) == b"x"
        yield child
    finally:
        os.close(heard)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
