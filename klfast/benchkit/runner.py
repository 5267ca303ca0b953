"""Contenders of a group, checked and then timed in turns.

A round of a peer is preceded by a timed call of each of klfast's contenders, so that every ratio comes from calls that
saw the same machine. Before each timed call its contender makes an untimed one: threads are awake and the code is in
cache, as in a program that makes one call after the other. Weights are not: calls rotate through copies of them.

On a GPU a round takes many calls of each contender, timed on the device (klfast/benchkit/clock.py): one call would show
how long Python takes to launch it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from klfast.benchkit.clock import Clock

MIN_ROUNDS, MAX_ROUNDS = 3, 200
_OUTSIDE_ROUNDS = 7  # of a program of its own
_LONG_SECONDS = 0.05  # calls that take longer need no untimed call before them
_SPIN_SECONDS = (
    0.02  # OpenMP's threads spin for so long after a call, and would slow down a peer with threads of its own
)


class Unavailable(Exception):
    """A contender that this machine or these shapes do not allow; says why."""


@dataclass
class Contender:
    """One way to compute what a group is about.

    Attributes:
        calls: one for each copy of the weights, all of equal result.
        error: computes one result and returns its distance from the reference, relative to the largest value.
        tolerance: what that distance may be.
        nbytes: memory that a call reads at least.
        peak: the dtype of its products, for their share of the machine's peak; empty where that says little.
        own_threads: it has a thread pool of its own, not torch's.
        facts: further columns of the table, found after the timing; called with the median in seconds.
    """

    calls: Sequence[Callable[[], object]]
    error: Callable[[], float]
    tolerance: float
    nbytes: int = 0
    peak: str = ""
    own_threads: bool = False
    facts: Callable[[float], dict] | None = None
    measured_error: float = field(init=False, default=float("nan"))
    _turn: itertools.cycle = field(init=False)

    def __post_init__(self) -> None:
        self._turn = itertools.cycle(self.calls)

    def __call__(self) -> object:
        return next(self._turn)()


@dataclass(frozen=True)
class Group:
    """What is computed, and who takes part: name -> what builds the contender. Names of klfast's begin with "klfast"."""

    name: str
    facts: dict[str, object]
    contenders: dict[str, Callable[[], Contender]]
    flops: float = 0.0

    @property
    def ours(self) -> list[str]:
        return [name for name in self.contenders if is_ours(name)]


def is_ours(name: str) -> bool:
    return name.startswith("klfast")


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value; NaN if any is."""
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found.float() - expected.to(found.device).float()).abs().max()) / scale


def tolerance(dtype: torch.dtype) -> float:
    """Of results that are rounded to ``dtype``."""
    return {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


@dataclass(frozen=True)
class Times:
    """Seconds that the rounds of a contender took."""

    rounds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def min(self) -> float:
        return min(self.rounds)


class Race:
    """Builds, checks and times the contenders of one group at a time."""

    def __init__(self, settings) -> None:
        self._settings = settings
        self._clock: Clock | None = None  # of a GPU, made when something is timed
        self._group: Group | None = None
        self._ready: dict[str, Contender | Exception] = {}

    def enter(self, group: Group) -> bool:
        """Make ``group`` the current one; True if it was not."""
        if group is self._group:
            return False
        self._group, self._ready = group, {}
        return True

    def contender(self, name: str) -> Contender:
        """A contender of the current group, its result checked.

        Raises:
            Unavailable: it cannot take part.
            AssertionError: its result is wrong.
        """
        if name not in self._ready:
            try:
                self._ready[name] = self._built(name)
            except Exception as error:  # noqa: BLE001 (raised below, now and whenever a peer asks again)
                self._ready[name] = error
        found = self._ready[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _built(self, name: str) -> Contender:
        contender = self._group.contenders[name]()
        error = contender.error()
        assert error <= contender.tolerance, (
            f"{name} is off by {error:.1e}, allowed are {contender.tolerance:.0e}: no figure for a wrong result"
        )
        contender.measured_error = error
        return contender

    def rivals(self, name: str) -> dict[str, Contender]:
        """klfast's contenders that a peer is compared with; none for klfast's own."""
        if is_ours(name):
            return {}
        found = {}
        for ours in self._group.ours:
            try:
                found[ours] = self.contender(ours)
            except Exception:  # noqa: BLE001
                continue  # its own test says why
        return found

    def run(self, name: str, benchmark) -> tuple[Times, dict[str, float]]:
        """Time a contender; returns that and how many times as fast as it each of klfast's is.

        On the CPU by ``benchmark``, on GPUs by the device's clock.
        """
        contender, rivals = self.contender(name), self.rivals(name)
        own, theirs = (
            self._by_device(name, contender, rivals)
            if self._settings.device != "cpu"
            else self._by_benchmark(name, contender, rivals, benchmark)
        )
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
        self, name: str, contender: Contender, rivals: dict[str, Contender], benchmark
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

    def run_outside(self, name: str, once: Callable[[], float]) -> tuple[float, dict[str, float]]:
        """On the CPU, have a peer time itself, in turns with klfast's contenders: its median in seconds, and how many times as fast as it each of klfast's is."""
        calls, own = self.rivals(name), []
        times = {ours: [] for ours in calls}
        for call in calls.values():
            call()
        for _ in range(_OUTSIDE_ROUNDS):
            for ours, taken in times.items():
                taken.append(timed(calls[ours]))
            time.sleep(_SPIN_SECONDS)
            own.append(once())
        median = statistics.median(own)
        return median, {ours: median / statistics.median(taken) for ours, taken in times.items()}


def _usual_seconds(call: Callable[[], object]) -> float:
    """Of the second call, if the first is no long one."""
    first = timed(call)
    return first if first >= _LONG_SECONDS else timed(call)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
