"""Contenders of a group, checked and then timed in turns.

A timed call of each of klfast's contenders precedes each round of a peer, so that every ratio comes from calls under
the same conditions. An untimed call of the same contender precedes each timed one, so that threads are awake and code
is cached, as in a program that makes one call after another. Weights are not cached: calls rotate through copies of
them.

On a GPU a round has many calls of each contender, timed on the device (klfast/benchkit/clock.py): a single call would
measure Python's launch time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from klfast.benchkit.clock import Clock
from klfast.benchkit.settings import Settings

MIN_ROUNDS, MAX_ROUNDS = 3, 200
_OWN_CLOCK_ROUNDS = 7
_LONG_SECONDS = 0.05  # calls that take longer need no untimed call before them
_SPIN_SECONDS = 0.02  # OpenMP's threads spin this long after a call, and would slow down a peer with its own threads


class UnavailableError(Exception):
    """A contender that does not support this machine or these shapes; the message says why."""


class Benchmark(Protocol):
    """The part of pytest-benchmark's fixture that is used here."""

    stats: Any

    def pedantic(self, target: Callable[[], object], *, setup: Callable[[], None], rounds: int) -> object:
        """Time ``rounds`` calls of ``target``, each after a call of ``setup``."""


@dataclass
class Contender:
    """One way to compute a group's result.

    Attributes:
        calls: one for each copy of the weights, all with the same result.
        error: computes one result and returns its distance from the reference, relative to the largest value; None for
            a program that does not show its results.
        tolerance: the largest acceptable distance.
        nbytes: the least memory that a call reads, or reads and writes back.
        copy_nbytes: the memory of each copy that ``calls`` rotate through; 0 for ``nbytes``: a call reads a copy once.
        peak: the dtype of its products, for their share of the machine's peak; empty where that is not informative.
        own_threads: True if it has its own thread pool, not torch's.
        own_clock: True if a call returns the seconds that count: a program that starts again each time.
        facts: returns further columns of the table after the timing, given the median in seconds.
    """

    calls: Sequence[Callable[[], Any]]
    error: Callable[[], float] | None
    tolerance: float
    nbytes: int = 0
    peak: str = ""
    own_threads: bool = False
    own_clock: bool = False
    facts: Callable[[float], dict[str, object]] | None = None
    copy_nbytes: int = 0
    measured_error: float = field(init=False, default=float("nan"))
    _turn: itertools.cycle[Callable[[], Any]] = field(init=False)

    def __post_init__(self) -> None:
        self._turn = itertools.cycle(self.calls)

    @property
    def rotated_nbytes(self) -> int:
        """The memory of all copies."""
        return (self.copy_nbytes or self.nbytes) * len(self.calls)

    def __call__(self) -> Any:
        """Make the next call in turn."""
        return next(self._turn)()


@dataclass(frozen=True)
class Group:
    """A computation and its contenders: name -> function that builds one. klfast's names begin with "klfast"."""

    name: str
    facts: dict[str, object]
    contenders: dict[str, Callable[[], Contender]]
    flops: float = 0.0

    @property
    def ours(self) -> list[str]:
        """Names of klfast's contenders."""
        return [name for name in self.contenders if is_ours(name)]


def is_ours(name: str) -> bool:
    """Return True for the name of one of klfast's contenders."""
    return name.startswith("klfast")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; NaN if any value is."""
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found.float() - expected.to(found.device).float()).abs().max()) / scale


def tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance for results that are rounded to ``dtype``."""
    return {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@dataclass(frozen=True)
class Times:
    """Seconds of each round of a contender."""

    rounds: Sequence[float]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def min(self) -> float:
        """The fastest round."""
        return min(self.rounds)


class Race:
    """Builds, checks and times the contenders of one group at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock: Clock | None = None  # the GPU's, created at the first timing
        self._group: Group | None = None
        self._ready: dict[str, Contender | Exception] = {}

    def enter(self, group: Group) -> bool:
        """Make ``group`` the current one; return False if it already was."""
        if group is self._group:
            return False
        self._group, self._ready = group, {}
        return True

    def contender(self, name: str) -> Contender:
        """Return a contender of the current group, with its result checked.

        Raises:
            UnavailableError: it cannot take part.
            AssertionError: its result is wrong.
        """
        if name not in self._ready:
            try:
                self._ready[name] = self._built(name)
            except Exception as error:  # noqa: BLE001 (raised below, now and whenever a peer needs it again)
                self._ready[name] = error
        found = self._ready[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _built(self, name: str) -> Contender:
        contender = self._current.contenders[name]()
        if contender.error is None:
            return contender
        error = contender.error()
        assert error <= contender.tolerance, (
            f"{name}: error {error:.1e} exceeds the tolerance {contender.tolerance:.0e}; wrong results are not timed"
        )
        contender.measured_error = error
        return contender

    @property
    def _current(self) -> Group:
        assert self._group is not None, "enter a group first"
        return self._group

    def rivals(self, name: str) -> dict[str, Contender]:
        """Return klfast's contenders that a peer is compared with; none for klfast's own."""
        if is_ours(name):
            return {}
        found = {}
        for ours in self._current.ours:
            try:
                found[ours] = self.contender(ours)
            except Exception:  # noqa: BLE001 (its own test says why)
                continue
        return found

    def run(self, name: str, benchmark: Benchmark | None) -> tuple[Times, dict[str, float]]:
        """Time a contender, on the CPU by ``benchmark``, on GPUs by the device's clock, unless it times itself.

        Returns:
            Its times, and the speedup over it of each of klfast's contenders.
        """
        contender, rivals = self.contender(name), self.rivals(name)
        if contender.own_clock:
            own, theirs = self._by_itself(contender, rivals)
        elif self._settings.device != "cpu":
            own, theirs = self._by_device(name, contender, rivals)
        else:
            assert benchmark is not None
            own, theirs = self._by_benchmark(name, contender, rivals, benchmark)
        return own, {ours: own.median / times.median for ours, times in theirs.items()}

    def _by_device(
        self, name: str, contender: Contender, rivals: dict[str, Contender]
    ) -> tuple[Times, dict[str, Times]]:
        if self._clock is None:
            self._clock = Clock(self._settings.device)
        taken = self._clock.samples(rivals | {name: contender}, self._settings.seconds * (1 + bool(rivals)), MAX_ROUNDS)
        times = {each: Times(some) for each, some in taken.items()}
        return times.pop(name), times

    def _by_benchmark(
        self, name: str, contender: Contender, rivals: dict[str, Contender], benchmark: Benchmark
    ) -> tuple[Times, dict[str, Times]]:
        calls = rivals | {name: contender}
        usual = {each: _usual_seconds(call) for each, call in calls.items()}
        times: dict[str, list[float]] = {ours: [] for ours in rivals}

        def wake(each: str) -> None:
            if usual[each] < _LONG_SECONDS:
                calls[each]()

        def before() -> None:
            for ours, taken in times.items():
                wake(ours)
                taken.append(timed(calls[ours]))
            if contender.own_threads:
                time.sleep(_SPIN_SECONDS)
            wake(name)

        round_seconds = (
            sum(t if t >= _LONG_SECONDS else 2 * t for t in usual.values()) + contender.own_threads * _SPIN_SECONDS
        )
        rounds = int(min(max(self._settings.seconds * (1 + bool(rivals)) / round_seconds, MIN_ROUNDS), MAX_ROUNDS))
        benchmark.pedantic(calls[name], setup=before, rounds=rounds)
        return Times(benchmark.stats.stats.data), {ours: Times(taken) for ours, taken in times.items()}

    def _by_itself(self, contender: Contender, rivals: dict[str, Contender]) -> tuple[Times, dict[str, Times]]:
        own: list[float] = []
        times: dict[str, list[float]] = {ours: [] for ours in rivals}
        for call in rivals.values():
            call()
        for _ in range(_OWN_CLOCK_ROUNDS):
            for ours, taken in times.items():
                taken.append(timed(rivals[ours]))
            time.sleep(_SPIN_SECONDS)
            own.append(contender())
        return Times(own), {ours: Times(taken) for ours, taken in times.items()}


def _usual_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of the second call, or of the first if that is long."""
    first = timed(call)
    return first if first >= _LONG_SECONDS else timed(call)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
