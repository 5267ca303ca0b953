"""Greedy allocation of candidates (layer, spec), cheapest first: the paper's, and one under a budget.

The paper (arXiv 2604.13440) quantizes a candidate, measures the perplexity and takes the candidate back if it rose
above gamma times the baseline. Two differences: here the baseline is always the full-precision model's (the paper's
code resets it after each accepted layer, so that its 10 % compounds), and a layer that moves from 8 bits to 4 is
rounded from its original weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from klfast.core.errors import InvalidInputError
from klfast.planning.budget import Budget, summed_cost
from klfast.planning.choices import Picks, bytes_of
from klfast.planning.numbers_given import require_number
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem


def plan_greedy(problem: Problem, budget: Budget) -> Plan:
    """Return a plan without evaluation: candidates in order until the sizes meet the budget, or while the KL does."""
    picks = problem.start

    def used(chosen: Picks) -> Fraction:  # exactly, since differences are added up
        return sum(map(Fraction, map(budget.counted, chosen.values())), Fraction())

    total = used(picks)
    for candidate in _candidates(problem, budget.sizes):
        if budget.limits_size and total <= budget.limit:
            break
        before = {name: picks[name] for name in candidate}
        after = total - used(before) + used(candidate)
        if budget.sizes(candidate) < budget.sizes(before) and (budget.limits_size or after <= budget.limit):
            picks |= candidate
            total = after
    budget.require(problem, picks, "raise the budget, or sweep specs with fewer bits", "greedy plan")
    return problem.plan(picks, "greedy")


def plan_greedy_evaluated(
    problem: Problem, budget: Budget | None, evaluate: Callable[[Plan], float], gamma: float
) -> Plan:
    """Return the paper's plan: a candidate stays if the perplexity from ``evaluate`` is at most gamma x baseline."""
    if budget is not None and not budget.limits_size:
        raise InvalidInputError(
            "greedy with evaluate is limited by perplexity; give max_bytes or mean_bits to stop it early, not max_kl"
        )
    gamma = require_number("gamma", gamma, 1.0)
    picks, notes = problem.start, []
    baseline = perplexity = _perplexity(evaluate, problem.plan(problem.full, "greedy"))
    if not math.isfinite(baseline) or baseline <= 0:
        raise InvalidInputError(f"evaluate gave {baseline} for the full-precision model; it must return a perplexity")
    if any(choice.spec is not None for choice in picks.values()):
        perplexity = _perplexity(evaluate, problem.plan(picks, "greedy"))
        if not perplexity <= gamma * baseline:
            notes.append(
                f"the layers in keep raise the perplexity to {perplexity:.4f}, above gamma times that of full precision"
            )
    accepted = tried = 0
    sizes = bytes_of if budget is None else budget.sizes
    for candidate in _candidates(problem, sizes):
        if budget is not None and budget.met(picks):
            break
        if sizes(candidate) >= sizes({name: picks[name] for name in candidate}):
            continue
        trial = {**picks, **candidate}
        result = _perplexity(evaluate, problem.plan(trial, "greedy"))
        tried += 1
        if result <= gamma * baseline:  # rejects NaN, too
            picks, perplexity, accepted = trial, result, accepted + 1
    if budget is not None:
        budget.require(problem, picks, f"raise {budget.name} or gamma", f"greedy plan within gamma={gamma:g}")
    notes.append(
        f"accepted {accepted} of {tried} candidates tried; "
        f"perplexity {baseline:.4f} in full precision, {perplexity:.4f} planned"
    )
    return problem.plan(picks, "greedy", notes)


def _perplexity(evaluate: Callable[[Plan], float], plan: Plan) -> float:
    found = evaluate(plan)
    try:
        return float(found)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInputError(f"evaluate must return a perplexity, got {type(found).__name__}") from None


def _candidates(problem: Problem, sizes: Callable[[Picks], float]) -> list[Picks]:
    """Return the units' choices by rising cost; on ties, the larger first, then in module order."""
    found = [picks for unit in problem.units for picks in unit[1:]]
    return sorted(found, key=lambda picks: (summed_cost(picks), -sizes(picks)))
