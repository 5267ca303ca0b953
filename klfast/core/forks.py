"""What a forked process starts with: OpenMP's threads and those that hold locks are not in it."""

from __future__ import annotations

import os
import threading
import weakref

import torch

_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()


def lock() -> threading.Lock:
    """Return a lock that forked processes find open, whoever holds it at the fork."""
    made = threading.Lock()
    _locks.add(made)
    return made


def _begin() -> None:
    # GNU's OpenMP waits for ever for the threads that its process had before the fork, in torch's kernels, too.
    torch.set_num_threads(1)
    for each in _locks:
        each._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library's own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
