"""The best plan under a budget: a multiple-choice knapsack, solved to proven optimality.

One choice a layer; minimise the sum of values while the sum of weights stays within a limit. (For a byte budget the
value is the cost and the weight the bytes; for a KL budget the other way round.)

Values span ten orders of magnitude (KL from 1e-8 to 1e2), which a MILP solver with absolute tolerances would not see
through. So the problem is first cut down, exactly: choices that another choice of the layer beats in both value and
weight go; a greedy solution along the convex hulls gives an upper bound, the Lagrangian at its last step a lower one;
a choice that would lift the lower bound above the upper is in no better solution and goes too. What is left, a few
choices of like size, goes to scipy's HiGHS.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from klfast.planner.problem import Budget, Choice, Problem
from klfast.types import Plan

Option = tuple[float, float]  # value, weight

_SCALE = 1e4  # of objective and constraint as HiGHS sees them, against its absolute tolerances of 1e-6
_TIE_BREAK = 1e-8  # of the objective goes to the weights: of equally good solutions, the one that uses less of the budget
_MAX_CUTS = 50


@dataclass(frozen=True)
class Solution:
    """The index of the chosen option for each layer; ``gap``: how far the value may be above the optimum, 0 if proven."""

    picks: list[int]
    gap: float


def plan_optimal(problem: Problem, budget: Budget, time_limit: float) -> Plan:
    smallest = {name: min(choices, key=lambda c: c.nbytes if budget.of_bytes else c.cost) for name, choices in problem.layers.items()}
    budget.require(problem, smallest, "raise the budget, or sweep specs with fewer bits")
    options = [
        [(c.cost, c.nbytes) if budget.of_bytes else (c.nbytes, c.cost) for c in choices] for choices in problem.layers.values()
    ]
    solution = solve(options, budget.limit, time_limit)
    picks = {name: choices[i] for (name, choices), i in zip(problem.layers.items(), solution.picks, strict=True)}
    notes = []
    if solution.gap:
        unit = problem.metric if budget.of_bytes else "bytes"
        notes.append(f"stopped after {time_limit:g} s: at most {solution.gap:.3g} {unit} above the optimum")
    return problem.plan(picks, "optimal", notes)


def solve(options: Sequence[Sequence[Option]], limit: float, time_limit: float = 60.0) -> Solution:
    """Minimise the summed value within ``limit``; the least weights must fit. Values and weights are finite and >= 0.

    Proven to a relative 1e-8 of the value above what no solution can avoid. Sums are checked without rounding error
    (math.fsum), so that the limit holds exactly.
    """
    fronts = [_front(layer) for layer in options]
    picks, price = _greedy(options, fronts, limit)
    value = _total(options, picks, 0)
    lower, kept = _reduce(options, fronts, limit, price, value)
    if value <= lower or all(len(front) == 1 for front in kept):
        return Solution(picks, 0.0)
    found, proven = _milp(options, kept, limit, value, time_limit)
    if found is not None and (_total(options, found, 0), _total(options, found, 1)) < (value, _total(options, picks, 1)):
        picks, value = found, _total(options, found, 0)
    return Solution(picks, 0.0 if proven else max(value - lower, 0.0))


def _total(options: Sequence[Sequence[Option]], picks: Sequence[int], which: int) -> float:
    return math.fsum(layer[i][which] for layer, i in zip(options, picks, strict=True))


def _front(layer: Sequence[Option]) -> list[int]:
    """Options that no other beats: rising weight, falling value. Of equals, the first."""
    front: list[int] = []
    for i in sorted(range(len(layer)), key=lambda i: (layer[i][1], layer[i][0], i)):
        if not front or layer[i][0] < layer[front[-1]][0]:
            front.append(i)
    return front


def _hull(layer: Sequence[Option], front: Sequence[int]) -> list[int]:
    """The front's lower convex hull: each further step buys less value per weight than the one before."""
    hull: list[int] = []
    for i in front:
        while len(hull) > 1 and _rate(layer, hull[-2], hull[-1]) <= _rate(layer, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _rate(layer: Sequence[Option], a: int, b: int) -> float:
    """Value saved per weight added from option a to option b."""
    return (layer[a][0] - layer[b][0]) / (layer[b][1] - layer[a][1])


def _greedy(options: Sequence[Sequence[Option]], fronts: list[list[int]], limit: float) -> tuple[list[int], float]:
    """A good solution, and the price of weight in value at the first step that does not fit (0 if all do)."""
    picks = [front[0] for front in fronts]
    steps = []
    for n, (layer, front) in enumerate(zip(options, fronts, strict=True)):
        hull = _hull(layer, front)
        steps += [(-_rate(layer, a, b), n, a, b) for a, b in zip(hull, hull[1:], strict=False)]
    price = 0.0
    for rate, n, a, b in sorted(steps):
        if picks[n] == a and _fits(options, picks, n, b, limit):
            picks[n] = b
        else:
            price = price or -rate
    for n, front in enumerate(fronts):  # what room is left, filled in passing
        for i in front[front.index(picks[n]) + 1 :]:
            if _fits(options, picks, n, i, limit):
                picks[n] = i
    return picks, price


def _fits(options: Sequence[Sequence[Option]], picks: list[int], n: int, i: int, limit: float) -> bool:
    return _total(options, [*picks[:n], i, *picks[n + 1 :]], 1) <= limit


def _reduce(
    options: Sequence[Sequence[Option]], fronts: list[list[int]], limit: float, price: float, upper: float
) -> tuple[float, list[list[int]]]:
    """A lower bound on the value, and the options that a solution of value <= ``upper`` can have."""
    priced = [[layer[i][0] + price * layer[i][1] for i in front] for layer, front in zip(options, fronts, strict=True)]
    least = [min(row) for row in priced]
    lower = math.fsum([*least, -price * limit])
    # The rounding of sums this large must not cost an option.
    slack = upper - lower + 1e-12 * (upper + math.fsum(least) + price * limit)
    kept = [[i for i, p in zip(front, row, strict=True) if p - m <= slack] for front, row, m in zip(fronts, priced, least, strict=True)]
    return lower, kept


def _milp(
    options: Sequence[Sequence[Option]], kept: list[list[int]], limit: float, upper: float, time_limit: float
) -> tuple[list[int] | None, bool]:
    """The best solution found among the kept options (None if none), and whether it is proven."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owner = np.array([n for n, front in enumerate(kept) for _ in front])
    index = [i for front in kept for i in front]
    value, weight = np.array([options[n][i] for n, i in zip(owner, index, strict=True)], dtype=np.float64).T
    # Only differences within a layer matter: with the least of each layer taken off, sums lose no digits.
    base_value = [min(options[n][i][0] for i in front) for n, front in enumerate(kept)]
    base_weight = [min(options[n][i][1] for i in front) for n, front in enumerate(kept)]
    value, weight = value - np.array(base_value)[owner], weight - np.array(base_weight)[owner]
    room = math.fsum([limit, *(-w for w in base_weight)])
    spread = math.fsum([upper, *(-v for v in base_value)])
    if spread <= 0 or room < 0:
        return None, True
    load = weight * (_SCALE / room) if room > 0 else np.where(weight > 0, _SCALE, 0.0)
    objective = value * (_SCALE / spread) + load * _TIE_BREAK
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(kept), len(owner)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(load[None], -np.inf, _SCALE if room > 0 else 0.0)]
    for _ in range(_MAX_CUTS):
        with _silent_stdout():
            result = milp(
                objective,
                integrality=np.ones(len(owner)),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "time_limit": time_limit},
            )
        if result.x is None:
            return None, result.status == 2  # 2: infeasible, which only cuts can bring about
        chosen = np.array([max(np.flatnonzero(owner == n), key=lambda j: result.x[j]) for n in range(len(kept))])
        picks = [index[j] for j in chosen]
        if _total(options, picks, 1) <= limit:
            return picks, result.status == 0
        # Over the limit by less than the solver's tolerance: exclude this very solution and go on.
        cut = np.zeros(len(owner))
        cut[chosen] = 1.0
        constraints.append(LinearConstraint(cut[None], -np.inf, len(kept) - 1))
    return None, False


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep C's stdout shut: the HiGHS of scipy 1.17 prints a debugging line there whatever its options say, into the
    midst of a caller's JSON."""
    try:
        saved = os.dup(1)
    except OSError:  # no stdout, nothing to keep clean
        yield
        return
    _flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(saved, 1)
        os.close(nowhere)
        os.close(saved)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # the C library's own buffers
        ctypes.CDLL(None).fflush(None)
