"""Repair of a plan by measuring whole plans: costs that were measured one by one are not quite additive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from klfast.core.errors import InvalidInputError
from klfast.planning.budget import Budget, summed_cost
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Picks, Problem
from klfast.planning.uniform import uniform_picks

Measure = Callable[[Plan], float]


def refine(problem: Problem, budget: Budget, plan: Plan, measure: Measure, tries: int) -> Plan:
    """Return the best of the measured plans within a budget of bytes: this one, uniform ones, and swaps in the best.

    A swap gives one layer its next larger choice and pays for it with the next smaller choices of others. Those of
    least predicted cost are measured first; whenever one is better than the best plan so far, it takes its place.

    Args:
        problem: the choices.
        budget: of bytes.
        plan: to repair.
        measure: returns the KL of a whole plan, nats per token.
        tries: most swaps to measure.

    Returns:
        The plan, whose ``predicted`` has "kl_measured".
    """
    if not budget.of_bytes:
        raise InvalidInputError("only a plan within max_bytes or mean_bits can be refined, not one within max_kl")
    search = _Search(problem, measure)
    first = search.try_plan(_picks(problem, plan))
    for picks in uniform_picks(problem):
        if budget.met(picks):
            search.try_plan(picks)
    improved = 0
    swaps = _swaps(problem, budget, search.best)
    for _ in range(tries):
        if (trial := next(swaps, None)) is None:
            break
        before = search.least
        if search.try_plan(trial) < before:
            improved += 1
            swaps = _swaps(problem, budget, search.best)
    note = (
        f"refined: KL {search.least:.6g} measured, {first:.6g} before, in {len(search.seen)} whole plans of which "
        f"{improved} swaps were taken"
    )
    return search.result(plan.method, (note,))


class _Search:
    """The plans that were measured, and the best of them."""

    def __init__(self, problem: Problem, measure: Measure) -> None:
        self.problem, self.measure = problem, measure
        self.seen: dict[tuple[str, ...], float] = {}
        self.best: Picks = {}
        self.least = math.inf

    def try_plan(self, picks: Picks) -> float:
        """Measure a plan, unless it was; return its KL, infinite if it is not finite."""
        key = tuple(str(choice.spec) for choice in picks.values())
        if key not in self.seen:
            try:
                found = float(self.measure(self.problem.plan(picks, "optimal")))
            except (TypeError, ValueError, OverflowError):
                raise InvalidInputError("refine must return the KL of a plan, a number") from None
            self.seen[key] = found if math.isfinite(found) else math.inf
        if self.seen[key] < self.least or not self.best:
            self.best, self.least = picks, self.seen[key]
        return self.seen[key]

    def result(self, method: str, notes: tuple[str, ...]) -> Plan:
        """Return the best plan."""
        measured = {"kl_measured": self.least} if math.isfinite(self.least) else {}
        return self.problem.plan(self.best, method, notes, measured)


def _picks(problem: Problem, plan: Plan) -> Picks:
    """Return the choices of a plan that was made from the problem."""
    return {
        name: next(choice for choice in choices if choice.spec == plan.specs.get(name))
        for name, choices in problem.layers.items()
    }


def _swaps(problem: Problem, budget: Budget, picks: Picks) -> Iterator[Picks]:
    """Yield plans within the budget, each with one unit larger, those of least predicted cost first."""
    used = budget.sizes(picks)
    found: list[tuple[float, int, Picks]] = []
    for unit in problem.units:
        held = {name: picks[name] for name in unit[0]}
        for larger in _next_larger(unit, held, budget):
            trial, size = {**picks, **larger}, used + budget.sizes(larger) - budget.sizes(held)
            for before, smaller in _cheapest_savings(problem, budget, picks, without=unit):
                if size <= budget.limit:
                    break
                size += budget.sizes(smaller) - budget.sizes(before)
                trial |= smaller
            if size <= budget.limit:
                found.append((summed_cost(trial), len(found), trial))
    for _, _, trial in sorted(found, key=lambda each: each[:2]):
        yield trial


def _next_larger(unit: list[Picks], held: Picks, budget: Budget) -> list[Picks]:
    """Return the choice of a unit that is next in bytes and costs less, as a list of at most one."""
    size, cost = budget.sizes(held), summed_cost(held)
    better = [each for each in unit if budget.sizes(each) > size and summed_cost(each) < cost]
    return [min(better, key=lambda each: (budget.sizes(each), summed_cost(each)))] if better else []


def _cheapest_savings(
    problem: Problem, budget: Budget, picks: Picks, without: list[Picks]
) -> list[tuple[Picks, Picks]]:
    """Return for each other unit its choices now and the smaller ones of least added cost a byte; the least first."""
    found = []
    for number, unit in enumerate(problem.units):
        held = {name: picks[name] for name in unit[0]}
        size, cost = budget.sizes(held), summed_cost(held)
        rates = [
            ((summed_cost(each) - cost) / (size - budget.sizes(each)), number, place)
            for place, each in enumerate(unit)
            if unit is not without and budget.sizes(each) < size
        ]
        if rates:
            rate, _, place = min(rates)
            found.append((rate, number, held, unit[place]))
    return [(held, smaller) for _, _, held, smaller in sorted(found, key=lambda each: each[:2])]
