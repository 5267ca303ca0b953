"""Medians of calls that take turns, by the device's events or, where there are none, by the clock."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]
_SAMPLE_SECONDS = 0.005  # short calls are timed many at once: the queue stays full, and a clock's tick is small beside them
_MOST_CALLS, _FEWEST_ROUNDS, _MOST_ROUNDS = 100, 3, 100
_LONG_SECONDS = 0.2  # calls that take longer are not tried twice


class Clock:
    """Times calls on a device; ``by`` says by what."""

    def __init__(self, device: str) -> None:
        self._module = None if device == "cpu" else importlib.import_module(f"torch.{device}")
        self.by = "clock"
        if self._module is not None:
            try:
                self._by_events(lambda: None)
                self.by = "device events"
            except (RuntimeError, NotImplementedError):  # drivers without timestamps
                self.by = "clock, the device synchronized"

    def seconds(self, run: Call) -> float:
        """Of one run, the device's work included."""
        return self._by_events(run) if self.by == "device events" else self._by_clock(run)

    def _by_events(self, run: Call) -> float:
        start, end = (self._module.Event(enable_timing=True) for _ in range(2))
        self._module.synchronize()
        start.record()
        run()
        end.record()
        self._module.synchronize()
        return start.elapsed_time(end) / 1e3

    def _by_clock(self, run: Call) -> float:
        self._synchronize()
        start = time.perf_counter()
        run()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._module is not None:
            self._module.synchronize()

    def medians(self, calls: Mapping[str, Call], seconds: float) -> dict[str, float]:
        """Median seconds of each call; rounds in which each has its turn, for about ``seconds`` in all."""
        usual = {name: self._usual(call) for name, call in calls.items()}
        counts = {name: int(min(max(_SAMPLE_SECONDS / max(one, 1e-9), 1), _MOST_CALLS)) for name, one in usual.items()}
        rounds = int(min(max(seconds / max(sum(usual[name] * counts[name] for name in calls), 1e-9), _FEWEST_ROUNDS), _MOST_ROUNDS))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(self.seconds(lambda call=call, name=name: [call() for _ in range(counts[name])]) / counts[name])
        return {name: statistics.median(taken) for name, taken in samples.items()}

    def _usual(self, call: Call) -> float:
        """Of a call that is not the first, unless that one is long."""
        first = self.seconds(call)
        return first if first > _LONG_SECONDS else self.seconds(call)
