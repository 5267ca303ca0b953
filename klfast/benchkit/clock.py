"""Timing of calls in turns, by the device's events or, where there are none, by the clock.

On a GPU a sample is many calls between two events. Before the first event the device gets work that lasts until all
calls are queued: it then runs them without waiting for Python, and a kernel of 10 us can be told from one of 20,
although a launch alone takes longer than both. Calls that wait for the device themselves are timed with that wait.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
_SAMPLE_SECONDS = 0.005  # short calls are timed many at once, to keep the queue full and exceed a clock's tick
_MOST_CALLS, _FEWEST_ROUNDS, _MOST_ROUNDS = 100, 3, 100
_LONG_SECONDS = 0.2  # calls that take longer are not tried twice
_BLOCKER_BYTES = 256_000_000
_MOST_BLOCKERS, _MOST_BLOCKED_SECONDS = 200, 0.05  # a device's queue is finite, and calls that wait need no blockers


class Clock:
    """Times calls on a device; ``by`` names the source of the times."""

    def __init__(self, device: str) -> None:
        self._module = None if device == "cpu" else importlib.import_module(f"torch.{device}")
        self._device = device
        self._block: torch.Tensor | None = None
        self._block_seconds = 0.0
        self.by = "clock"
        if self._module is not None:
            try:
                self._by_events(lambda: None, 1, 0)
                self.by = "device events"
            except (RuntimeError, NotImplementedError):  # drivers without timestamps
                self.by = "clock, the device synchronized"

    def seconds(self, call: Call, count: int = 1) -> float:
        """Return mean seconds per call over ``count`` consecutive calls, device time included.

        On GPUs one warm-up call precedes them.
        """
        if self.by != "device events":
            return self._by_clock(call, count)
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        return self._by_events(call, count, self._blockers(1.5 * queued * count))

    def samples(
        self, calls: Mapping[str, Call], seconds: float, most_rounds: int = _MOST_ROUNDS
    ) -> dict[str, list[float]]:
        """Return many samples of each call's seconds, from rounds in which all take turns, for about ``seconds``."""
        usual = {name: self._usual(call) for name, call in calls.items()}
        counts = {name: int(min(max(_SAMPLE_SECONDS / max(one, 1e-9), 1), _MOST_CALLS)) for name, one in usual.items()}
        round_seconds = max(sum(usual[name] * counts[name] for name in calls), 1e-9)
        rounds = int(min(max(seconds / round_seconds, _FEWEST_ROUNDS), most_rounds))
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(
                    self._by_clock(call, 1) if usual[name] > _LONG_SECONDS else self.seconds(call, counts[name])
                )
        return taken

    def medians(self, calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
        """Return the median seconds of each call; see ``samples``."""
        return {name: statistics.median(taken) for name, taken in self.samples(calls, seconds).items()}

    def _usual(self, call: Call) -> float:
        """Return the seconds of a warmed-up call, or of the first call if that is already long."""
        first = self._by_clock(call, 1)
        return first if first > _LONG_SECONDS else self.seconds(call, 2)

    def _by_events(self, call: Call, count: int, blockers: int) -> float:
        assert self._module is not None
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._module.synchronize()
        if self._block is not None:
            for _ in range(blockers):
                self._block.add_(1)
        start.record()
        for _ in range(count):
            call()
        end.record()
        self._module.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / count

    def _by_clock(self, call: Call, count: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._synchronize()
        return (time.perf_counter() - start) / count

    def _blockers(self, seconds: float) -> int:
        """Return how many additions to a block of memory keep the device busy for ``seconds``."""
        if self._block is None:
            with torch.inference_mode(False):  # otherwise it could not be written outside inference mode
                block = torch.zeros(_BLOCKER_BYTES // 4, device=self._device)
            self._by_events(lambda: block.add_(1), 1, 0)  # the first loads the kernel
            self._block_seconds = max(self._by_events(lambda: block.add_(1), 10, 0), 1e-6)
            self._block = block
        return min(int(min(seconds, _MOST_BLOCKED_SECONDS) / self._block_seconds) + 1, _MOST_BLOCKERS)

    def _synchronize(self) -> None:
        if self._module is not None:
            self._module.synchronize()
