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
        return _plan_in(problem, budget, spec)
    if budget is None:
        raise InvalidInputError(
            "a uniform plan needs spec=, or a budget to choose one: max_bytes, mean_bits, max_seconds or max_kl"
        )
    trials = uniform_trials(problem)
    if not trials:
        engines = "that other engines run " if problem.servable else ""
        raise InvalidInputError(f"no spec {engines}was measured on every layer; pass spec=, or finish the sweep")
    least = min(trials.values(), key=budget.used)
    budget.require(problem, least, "raise the budget, or use method='optimal'", "uniform plan")
    fitting = {each: picks for each, picks in trials.items() if budget.met(picks)}
    best = min(fitting, key=lambda each: _order(fitting[each], budget))
    return as_plan(problem, fitting[best], best)


def uniform_picks(problem: Problem) -> list[Picks]:
    """Return the uniform plans whose cost is known."""
    return list(uniform_trials(problem).values())


def uniform_trials(problem: Problem) -> dict[QuantSpec | None, Picks]:
    """Return the uniform plans whose cost is known: for each spec that was measured on every layer, by spec.

    If no layer is free there is one, under None.
    """
    specs = sorted({measured for _, measured in problem.sensitivities.measurements})
    trials: dict[QuantSpec | None, Picks] = {None: problem.start}
    if problem.free:
        trials = {spec: _everywhere(problem, spec) for spec in specs}
    return {spec: picks for spec, picks in trials.items() if all(_is_known(problem, c) for c in picks.values())}


def as_plan(problem: Problem, picks: Picks, spec: QuantSpec | None) -> Plan:
    """Return the Plan of the choices for ``spec``; it notes why other layers than those that have no choice lack it."""
    full = [name for unit in problem.units if len(unit) > 1 for name in unit[0] if picks[name].spec is None]
    useless = [name for name in full if spec is not None and _choice(problem, name, spec).spec is None]
    notes = [
        f"{len(names)} layers keep full precision, since {why}: {', '.join(names)}"
        for why, names in (
            ("the spec saves nothing", useless),
            ("not all layers fused with them can have the spec", [name for name in full if name not in set(useless)]),
        )
        if names
    ]
    return problem.plan(picks, "uniform", notes)


def _plan_in(problem: Problem, budget: Budget | None, spec: QuantSpec) -> Plan:
    picks = _everywhere(problem, spec)
    for name, choice in picks.items():
        if problem.servable and choice.spec is not None and not is_served(choice.spec, name):
            raise InvalidInputError(f"no other engine runs {choice.spec} on {name}; {SERVED}")
        if choice.spec is not None and (why := choice.spec.why_unfit(problem.sensitivities.layers[name].shape[0])):
            raise InvalidInputError(f"{name} cannot be {choice.spec}: {why}; choose another spec, or exclude the layer")
    if budget is not None:
        if not budget.limits_size and any(c.kl is None for c in picks.values()):
            raise InvalidInputError(
                f"{spec} was not measured on every layer, so its KL is not known; sweep it, or give max_bytes"
            )
        budget.require(problem, picks, "raise the budget or choose another spec", f"uniform plan in {spec}")
    return as_plan(problem, picks, spec)


def _is_known(problem: Problem, choice: Choice) -> bool:
    """Return True if the cost of a choice was measured, and its KL, if that of others was."""
    return math.isfinite(choice.cost) and (choice.kl is not None or problem.kl_metric is None)


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
