"""The best plan under a budget: a multiple-choice knapsack, solved exactly.

One choice per layer; minimise the sum of values while the sum of weights stays within a limit. (For a byte budget the
value is the cost and the weight the bytes; for a KL budget it is the other way round.)

First the problem is reduced: choices that another choice of the layer beats in both value and weight are dropped; a
greedy solution along the convex hulls gives an upper bound, the Lagrangian at its last step a lower one; choices that
would lift the lower bound above the upper cannot be in a better solution and are dropped, too. Then layers are added
one by one to the list of partial plans worth keeping: those that no other beats in both sums, and that can still end
within the limit and below the upper bound (dynamic programming by Pareto lists; Nemhauser and Ullmann 1969, with
Pisinger's 1995 bounds). On the sensitivities of real models that list stays below a few thousand entries, and a plan of
200 layers takes less than 0.1 s. If it outgrows memory, which needs costs contrived in proportion to bytes, HiGHS takes
over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np

from klfast.planning.budget import Budget, summed_cost
from klfast.planning.milp import solve_milp
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem

Option = tuple[float, float]  # value, weight

_MAX_PARTIAL_PLANS = 300_000
_ROUNDING = 1e-9  # of a sum, far more than what adding up a million weights in turn rounds off


@dataclass(frozen=True)
class Solution:
    """The index of each layer's chosen option; ``gap`` bounds the value's distance from the optimum, 0 if proven."""

    picks: list[int]
    gap: float


def plan_optimal(problem: Problem, budget: Budget, time_limit: float) -> Plan:
    """Return the plan of least summed cost within a budget of sizes, or of least size within a KL budget."""
    both = [
        [
            (summed_cost(picks), budget.sizes(picks))
            if budget.limits_size
            else (budget.sizes(picks), summed_cost(picks))
            for picks in unit
        ]
        for unit in problem.units
    ]
    least = [unit.index(min(unit, key=itemgetter(1))) for unit in both]
    budget.require(problem, problem.together(least), "raise the budget, or sweep specs with fewer bits")
    solution = solve(both, budget.limit, time_limit)
    picks = problem.together(solution.picks)
    notes = []
    if solution.gap:
        unit = problem.metric if budget.limits_size else "seconds" if budget.in_seconds else "bytes"
        notes.append(f"stopped after {time_limit:g} s: at most {solution.gap:.3g} {unit} above the optimum")
    return problem.plan(picks, "optimal", notes)


def solve(options: Sequence[Sequence[Option]], limit: float, time_limit: float = 60.0) -> Solution:
    """Minimise the summed value within ``limit``; the least weights must fit. Values and weights are finite and >= 0.

    The limit holds for the exact sum (math.fsum). Of equally good solutions, return the one of least weight.
    """
    start = time.monotonic()
    fronts = [_front(layer) for layer in options]
    picks, price = _greedy(options, fronts, limit)
    value = _total(options, picks, 0)
    lower, kept = _reduce(options, fronts, limit, price, value)
    if value <= lower or all(len(front) == 1 for front in kept):
        return Solution(picks, 0.0)
    found, proven = _by_partial_plans(options, kept, limit, price, value, start + time_limit)
    if found is None and not proven:
        found, proven = solve_milp(options, kept, limit, value, max(time_limit - (time.monotonic() - start), 1.0))
    if found is not None and _sums(options, found) < _sums(options, picks):
        picks, value = found, _total(options, found, 0)
    return Solution(picks, 0.0 if proven else max(value - lower, 0.0))


def _sums(options: Sequence[Sequence[Option]], picks: Sequence[int]) -> tuple[float, float]:
    return _total(options, picks, 0), _total(options, picks, 1)


def _total(options: Sequence[Sequence[Option]], picks: Sequence[int], which: int) -> float:
    return math.fsum(layer[i][which] for layer, i in zip(options, picks, strict=True))


def _front(layer: Sequence[Option]) -> list[int]:
    """Return the options that no other beats: rising weight, falling value; of equals, the first."""
    front: list[int] = []
    for i in sorted(range(len(layer)), key=lambda i: (layer[i][1], layer[i][0], i)):
        if not front or layer[i][0] < layer[front[-1]][0]:
            front.append(i)
    return front


def _hull(layer: Sequence[Option], front: Sequence[int]) -> list[int]:
    """Return the front's lower convex hull: each step buys less value per weight than the one before."""
    hull: list[int] = []
    for i in front:
        while len(hull) > 1 and _rate(layer, hull[-2], hull[-1]) <= _rate(layer, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _rate(layer: Sequence[Option], a: int, b: int) -> float:
    """Return the value saved per weight added from option a to option b."""
    return (layer[a][0] - layer[b][0]) / (layer[b][1] - layer[a][1])


def _greedy(options: Sequence[Sequence[Option]], fronts: list[list[int]], limit: float) -> tuple[list[int], float]:
    """Return a good solution, and the price of weight in value at the first step that does not fit (0 if all fit)."""
    room = _Room(options, [front[0] for front in fronts], limit)
    picks, steps = room.picks, []
    for n, (layer, front) in enumerate(zip(options, fronts, strict=True)):
        hull = _hull(layer, front)
        steps += [(-_rate(layer, a, b), n, a, b) for a, b in pairwise(hull)]
    price = 0.0
    for rate, n, a, b in sorted(steps):
        if not (picks[n] == a and room.take(n, b)):
            price = price or -rate
    for n, front in enumerate(fronts):  # fill the remaining room
        for i in front[front.index(picks[n]) + 1 :]:
            room.take(n, i)
    return picks, price


class _Room:
    """Picks whose summed weight, exactly, is within a limit. It is only added up again where rounding could matter."""

    def __init__(self, options: Sequence[Sequence[Option]], picks: list[int], limit: float) -> None:
        self.options, self.picks, self.limit = options, picks, limit
        self._weight = _total(options, picks, 1)

    def take(self, n: int, i: int) -> bool:
        """Pick option i of layer n if it fits; return whether it does."""
        weight = self._weight - self.options[n][self.picks[n]][1] + self.options[n][i][1]
        if abs(weight - self.limit) > _ROUNDING * max(weight, abs(self.limit)):
            fits = weight <= self.limit
        else:
            fits = _total(self.options, [*self.picks[:n], i, *self.picks[n + 1 :]], 1) <= self.limit
        if fits:
            self.picks[n], self._weight = i, weight
        return fits


def _reduce(
    options: Sequence[Sequence[Option]], fronts: list[list[int]], limit: float, price: float, upper: float
) -> tuple[float, list[list[int]]]:
    """Return a lower bound on the value, and the options that a solution of value <= ``upper`` can have."""
    priced = [[layer[i][0] + price * layer[i][1] for i in front] for layer, front in zip(options, fronts, strict=True)]
    least = [min(row) for row in priced]
    lower = math.fsum([*least, -price * limit])
    # The rounding of such large sums must not drop an option.
    slack = upper - lower + 1e-12 * (upper + math.fsum(least) + price * limit)
    kept = [
        [i for i, p in zip(front, row, strict=True) if p - m <= slack]
        for front, row, m in zip(fronts, priced, least, strict=True)
    ]
    return lower, kept


def _by_partial_plans(
    options: Sequence[Sequence[Option]],
    kept: list[list[int]],
    limit: float,
    price: float,
    upper: float,
    deadline: float,
) -> tuple[list[int] | None, bool]:
    """Return the best solution among the kept options (None if none is below ``upper``), and True if it is proven."""
    # Extended precision where the machine has it: sums of doubles then agree with math.fsum at the limit.
    tables = [np.array([options[n][i] for i in front], dtype=np.longdouble).T for n, front in enumerate(kept)]
    order = sorted(range(len(kept)), key=lambda n: np.ptp(tables[n][1]), reverse=True)  # the most decisive layers first
    # The least that the layers from the t-th on add: weight, and value plus priced weight.
    rest_weight = _sums_from([tables[n][1].min() for n in order])
    rest_priced = _sums_from([(tables[n][0] + price * tables[n][1]).min() for n in order])
    slack = 1e-12 * (upper + rest_priced[0] + price * limit)
    value = weight = np.zeros(1, dtype=np.longdouble)
    steps = []
    for t, n in enumerate(order):
        trial_value = np.add.outer(value, tables[n][0]).ravel()
        trial_weight = np.add.outer(weight, tables[n][1]).ravel()
        fits = trial_weight + rest_weight[t + 1] <= limit * (1 + 1e-15)
        promises = trial_value + price * (trial_weight - limit) + rest_priced[t + 1] <= upper + slack
        alive = np.flatnonzero(fits & promises)
        alive = alive[np.lexsort((trial_value[alive], trial_weight[alive]))]
        if not alive.size:
            return None, True
        least = np.minimum.accumulate(trial_value[alive])
        alive = alive[np.append(True, least[1:] < least[:-1])]
        if alive.size > _MAX_PARTIAL_PLANS or time.monotonic() > deadline:
            return None, False
        value, weight = trial_value[alive], trial_weight[alive]
        steps.append(np.divmod(alive, len(kept[n])))
    for last in range(len(value) - 1, -1, -1):  # values fall along the list
        picks, at = [0] * len(kept), last
        for n, (parent, option) in zip(reversed(order), reversed(steps), strict=True):
            picks[n], at = kept[n][option[at]], parent[at]
        if _total(options, picks, 1) <= limit:
            return picks, True
    return None, True


def _sums_from(numbers: list[np.longdouble]) -> np.ndarray:
    """Return sums[t] = numbers[t] + numbers[t + 1] + ...; one longer than ``numbers``."""
    return np.append(np.cumsum(numbers[::-1])[::-1], np.longdouble(0))
