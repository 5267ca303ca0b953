"""Times of calls that take turns, by the device's events or, where there are none, by the clock.

On a GPU a sample is many calls between two events. Before the first event the device gets work that lasts until all of
them wait in its queue: it then goes from one to the next without waiting for Python, and a kernel of 10 us can be told
from one of 20, where a launch alone takes longer than both. Calls that themselves wait for the device are timed with
that wait.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
_SAMPLE_SECONDS = (
    0.005  # short calls are timed many at once: the queue stays full, and a clock's tick is small beside them
)
_MOST_CALLS, _FEWEST_ROUNDS, _MOST_ROUNDS = 100, 3, 100
_LONG_SECONDS = 0.2  # calls that take longer are not tried twice
_BLOCKER_BYTES = 256_000_000
_MOST_BLOCKERS, _MOST_BLOCKED_SECONDS = 200, 0.05  # a device's queue is finite, and calls that wait for it need none


class Clock:
    """Times calls on a device; ``by`` says by what."""

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
        """Of one of ``count`` calls one after the other, the device's work included. On GPUs a further call comes before them."""
        if self.by != "device events":
            return self._by_clock(call, count)
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        return self._by_events(call, count, self._blockers(1.5 * queued * count))

    def samples(
        self, calls: Mapping[str, Call], seconds: float, most_rounds: int = _MOST_ROUNDS
    ) -> dict[str, list[float]]:
        """Seconds of each call, many times; rounds in which each has its turn, for about ``seconds`` in all."""
        usual = {name: self._usual(call) for name, call in calls.items()}
        counts = {name: int(min(max(_SAMPLE_SECONDS / max(one, 1e-9), 1), _MOST_CALLS)) for name, one in usual.items()}
        rounds = int(
            min(
                max(seconds / max(sum(usual[name] * counts[name] for name in calls), 1e-9), _FEWEST_ROUNDS), most_rounds
            )
        )
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                taken[name].append(
                    self._by_clock(call, 1) if usual[name] > _LONG_SECONDS else self.seconds(call, counts[name])
                )
        return taken

    def medians(self, calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
        """Median seconds of each call; see ``samples``."""
        return {name: statistics.median(taken) for name, taken in self.samples(calls, seconds).items()}

    def _usual(self, call: Call) -> float:
        """Of a call that is not the first, unless that one is long."""
        first = self._by_clock(call, 1)
        return first if first > _LONG_SECONDS else self.seconds(call, 2)

    def _by_events(self, call: Call, count: int, blockers: int) -> float:
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._module.synchronize()
        for _ in range(blockers):
            self._block.add_(1)
        start.record()
        for _ in range(count):
            call()
        end.record()
        self._module.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def _by_clock(self, call: Call, count: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._synchronize()
        return (time.perf_counter() - start) / count

    def _blockers(self, seconds: float) -> int:
        """How many additions to a block of memory keep the device busy for so long."""
        if self._block is None:
            with torch.inference_mode(False):  # else it could not be written to outside of it
                self._block = torch.zeros(_BLOCKER_BYTES // 4, device=self._device)
            self._by_events(lambda: self._block.add_(1), 1, 0)  # the first loads the kernel
            self._block_seconds = max(self._by_events(lambda: self._block.add_(1), 10, 0), 1e-6)
        return min(int(min(seconds, _MOST_BLOCKED_SECONDS) / self._block_seconds) + 1, _MOST_BLOCKERS)

    def _synchronize(self) -> None:
        if self._module is not None:
            self._module.synchronize()
