"""Repair of a plan by measuring whole plans: costs that were measured one by one are not quite additive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from klfast.core.errors import InvalidInputError
from klfast.planning.budget import Budget, summed_cost
from klfast.planning.choices import Picks
from klfast.planning.numbers_given import shortened
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem
from klfast.planning.uniform import uniform_picks

Measure = Callable[[Plan], float]


def refine(problem: Problem, budget: Budget, plan: Plan, measure: Measure, tries: int) -> Plan:
    """Return the best of the measured plans within a budget of sizes: this one, uniform ones, and swaps in the best.

    A swap gives one layer its next larger choice and pays for it with the next smaller choices of others. Those of
    least predicted cost are measured first; whenever one is better than the best plan so far, it takes its place.

    Args:
        problem: the choices.
        budget: of bytes or seconds.
        plan: to repair.
        measure: returns the KL of a whole plan, nats per token.
        tries: most swaps to measure.

    Returns:
        The plan, whose ``predicted`` has "kl_measured".

    Raises:
        InvalidInputError: another budget, a number of tries that is none, or a measurement that is no number.
    """
    if not isinstance(tries, int) or isinstance(tries, bool) or tries < 0:
        raise InvalidInputError(f"tries must be a number of swaps, 0 or more, got {shortened(tries)}")
    if not budget.limits_size:
        raise InvalidInputError(
            "only a plan within max_bytes, mean_bits or max_seconds can be refined, not one within max_kl"
        )
    search = _Search(problem, measure, plan.method)
    first = search.try_plan(_picks(problem, plan))
    for picks in uniform_picks(problem):
        if budget.met(picks):
            search.try_plan(picks)
    improved = 0
    swaps = _swaps(problem, budget, search.best)
    while tries and (trial := next(swaps, None)) is not None:
        if search.knows(trial):
            continue
        before, tries = search.least, tries - 1
        if search.try_plan(trial) < before:
            improved += 1
            swaps = _swaps(problem, budget, search.best)
    note = (
        f"refined: KL {search.least:.6g} measured, {first:.6g} before, in {len(search.seen)} whole plans of which "
        f"{improved} swaps were taken"
    )
    return search.result((note,))


class _Search:
    """The plans that were measured, and the best of them."""

    def __init__(self, problem: Problem, measure: Measure, method: str) -> None:
        self.problem, self.measure, self.method = problem, measure, method
        self.seen: dict[tuple[str, ...], float] = {}
        self.best: Picks = {}
        self.least = math.inf

    def knows(self, picks: Picks) -> bool:
        """Return True if a plan was measured."""
        return _key(picks) in self.seen

    def try_plan(self, picks: Picks) -> float:
        """Measure a plan, unless it was; return its KL, infinite if it is not finite."""
        key = _key(picks)
        if key not in self.seen:
            measured = self.measure(self.problem.plan(picks, self.method))  # whose errors are its own
            try:
                found = float(measured)
            except (TypeError, ValueError, OverflowError):
                raise InvalidInputError("refine must return the KL of a plan, a number") from None
            self.seen[key] = found if math.isfinite(found) else math.inf
        if self.seen[key] < self.least or not self.best:
            self.best, self.least = picks, self.seen[key]
        return self.seen[key]

    def result(self, notes: tuple[str, ...]) -> Plan:
        """Return the best plan."""
        measured = {"kl_measured": self.least} if math.isfinite(self.least) else {}
        return self.problem.plan(self.best, self.method, notes, measured)


def _key(picks: Picks) -> tuple[str, ...]:
    return tuple(str(choice.spec) for choice in picks.values())


def _picks(problem: Problem, plan: Plan) -> Picks:
    """Return the choices of a plan that was made from the problem."""
    return {
        name: next(choice for choice in choices if choice.spec == plan.specs.get(name))
        for name, choices in problem.layers.items()
    }


def _swaps(problem: Problem, budget: Budget, picks: Picks) -> Iterator[Picks]:
    """Yield plans within the budget, each with one unit larger, those of least predicted cost first."""
    used, savings = budget.sizes(picks), _cheapest_savings(problem, budget, picks)
    parts = _exact_sum([choice.cost for choice in picks.values()])
    found: list[tuple[float, int, Picks, int]] = []  # cost, unit, its choices, number of savings
    for number, unit in enumerate(problem.units):
        held = {name: picks[name] for name in unit[0]}
        if (larger := _next_larger(unit, held, budget)) is None:
            continue
        size, taken = used + budget.sizes(larger) - budget.sizes(held), 0
        while size > budget.limit and taken < len(savings):
            other, saved, _ = savings[taken]
            size -= saved if other != number else 0
            taken += 1
        if size <= budget.limit:
            changed = _changes(number, larger, savings[:taken])
            costs = (cost for name, choice in changed.items() for cost in (choice.cost, -picks[name].cost))
            found.append((math.fsum((*parts, *costs)), number, larger, taken))
    for _, number, larger, taken in sorted(found, key=lambda each: each[:2]):
        yield {**picks, **_changes(number, larger, savings[:taken])}


def _exact_sum(values: list[float]) -> list[float]:
    """Return a few floats that add up to exactly the sum of the values, and so can stand for them in math.fsum."""
    parts: list[float] = []
    while rest := math.fsum((*values, *(-part for part in parts))):
        parts.append(rest)
    return parts


def _changes(number: int, larger: Picks, savings: list[tuple[int, float, Picks]]) -> Picks:
    """Return the choices that a swap changes: those of the larger unit, and the savings in other units."""
    return larger | {name: choice for other, _, some in savings if other != number for name, choice in some.items()}


def _next_larger(unit: list[Picks], held: Picks, budget: Budget) -> Picks | None:
    """Return the choice of a unit that is next in bytes and costs less; None if there is none."""
    size, cost = budget.sizes(held), summed_cost(held)
    better = [each for each in unit if budget.sizes(each) > size and summed_cost(each) < cost]
    return min(better, key=lambda each: (budget.sizes(each), summed_cost(each))) if better else None


def _cheapest_savings(problem: Problem, budget: Budget, picks: Picks) -> list[tuple[int, float, Picks]]:
    """Return for each unit its number, and the bytes and choices of least added cost a byte saved; the least first."""
    found = []
    for number, unit in enumerate(problem.units):
        held = {name: picks[name] for name in unit[0]}
        size, cost = budget.sizes(held), summed_cost(held)
        rates = [
            ((summed_cost(each) - cost) / (size - budget.sizes(each)), place)
            for place, each in enumerate(unit)
            if budget.sizes(each) < size
        ]
        if rates:
            rate, place = min(rates)
            found.append((rate, number, size - budget.sizes(unit[place]), unit[place]))
    return [each[1:] for each in sorted(found, key=lambda each: each[:2])]
