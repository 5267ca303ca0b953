"""Uniform plans, one spec for every layer: the baseline of mixed precision."""

from __future__ import annotations

import math
from dataclasses import replace

from klfast.core.errors import InvalidInputError
from klfast.planning.budget import Budget
from klfast.planning.choices import Choice, Picks
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem
from klfast.planning.servable import SERVED, is_served
from klfast.quant.spec import QuantSpec, storable_spec


def plan_uniform(problem: Problem, budget: Budget | None, spec: QuantSpec | None) -> Plan:
    """Return the plan with ``spec`` everywhere; without one, with the measured spec that meets the budget best.

    That is the one of least cost under a budget of sizes, or of least size under a KL budget.
    """
    if spec is not None:
        picks = _everywhere(problem, spec)
        for name, choice in picks.items():
            if problem.servable and choice.spec is not None and not is_served(choice.spec, name):
                raise InvalidInputError(f"no other engine runs {choice.spec} on {name}; {SERVED}")
        if budget is not None:
            if not budget.limits_size and any(c.kl is None for c in picks.values()):
                raise InvalidInputError(
                    f"{spec} was not measured on every layer, so its KL is not known; sweep it, or give max_bytes"
                )
            budget.require(problem, picks, "raise the budget or choose another spec")
        return _plan(problem, picks)
    if budget is None:
        raise InvalidInputError(
            "a uniform plan needs spec=, or a budget to choose one: max_bytes, mean_bits, max_seconds or max_kl"
        )
    trials = uniform_picks(problem)
    if not trials:
        raise InvalidInputError("no spec was measured on every layer; pass spec=, or finish the sweep")
    least = min(trials, key=budget.used)
    budget.require(problem, least, "raise the budget, or use method='optimal'")
    fitting = [picks for picks in trials if budget.met(picks)]
    return _plan(problem, min(fitting, key=lambda picks: _order(picks, budget)))


def uniform_picks(problem: Problem) -> list[Picks]:
    """Return the uniform plans whose cost is known, one for each spec that was measured on every layer."""
    specs = sorted({measured for _, measured in problem.sensitivities.measurements})
    trials = [_everywhere(problem, spec) for spec in specs] if problem.free else [problem.start]
    trials = [picks for picks in trials if all(c.kl is not None for c in picks.values()) or problem.kl_metric is None]
    return [picks for picks in trials if all(math.isfinite(c.cost) for c in picks.values())]


def _everywhere(problem: Problem, spec: QuantSpec) -> Picks:
    """Return ``spec`` on each layer that the user fixed neither itself nor by one that is fused with it."""
    found: Picks = {}
    for unit in problem.units:
        names = unit[0].keys()
        each = unit[0] if names & problem.settled.keys() else {name: _choice(problem, name, spec) for name in names}
        is_one = len({choice.spec for choice in each.values()}) == 1
        found |= each if is_one else {name: problem.full[name] for name in names}
    return {name: found[name] for name in problem.layers}


def _choice(problem: Problem, name: str, spec: QuantSpec) -> Choice:
    """Return ``spec`` on that layer, or full precision if the spec saves nothing there.

    If it was not measured, the cost is infinite and the KL None.
    """
    full = problem.full[name]
    shape = problem.sensitivities.layers[name].shape
    stored = storable_spec(spec, shape[1])
    nbytes = stored.saved_bytes(shape)
    if nbytes >= full.nbytes:
        return full
    found = next((c for c in problem.layers[name] if c.spec == stored), None)
    if found is None:
        return Choice(stored, nbytes, math.inf, None, None, spec, seconds=problem.seconds(name, stored))
    return replace(found, measured=spec)


def _order(picks: Picks, budget: Budget) -> tuple[float, float]:
    size, cost = budget.sizes(picks), math.fsum(c.cost for c in picks.values())
    return (cost, size) if budget.limits_size else (size, cost)


def _plan(problem: Problem, picks: Picks) -> Plan:
    full = [name for name, choice in picks.items() if choice.spec is None and len(problem.layers[name]) > 1]
    notes = [f"{len(full)} layers keep full precision, since the spec saves nothing: {', '.join(full)}"] if full else []
    return problem.plan(picks, "uniform", notes)
