"""Wall time that a sweep spends in each of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("teacher", "quantize", "own_block", "suffix", "divergence")


class Stages:
    """The seconds spent so far, by stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time spent to a stage, without that of stages inside it."""
        start, counted = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - counted
            self.seconds[stage] += time.perf_counter() - start - inside
