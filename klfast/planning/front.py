"""Plans of many sizes: the front of what sensitivities allow."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from klfast.core.errors import InvalidInputError
from klfast.planning.budget import Budget
from klfast.planning.choices import bytes_of
from klfast.planning.optimal import plan_optimal
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem
from klfast.planning.uniform import as_plan, uniform_trials
from klfast.sensitivity.results import Sensitivities

_SECONDS = 5.0  # for each plan; far more than most need


def front_plans(sensitivities: Sensitivities, count: int = 20, **choices: Any) -> list[Plan]:
    """Return plans of about ``count`` sizes, evenly from the smallest plan to the largest measured specs; no two alike.

    Args:
        sensitivities: as for ``klfast.plan``.
        count: of plans, 2 or more.
        choices: arguments of ``klfast.plan``: metric, layers, exclude, keep, activation, servable, timings.

    Raises:
        InvalidInputError: ``count`` is too small, or as ``klfast.plan``.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise InvalidInputError(f"a front has 2 plans or more, not {count!r}")
    problem = Problem.of(sensitivities, **choices)
    low, high = (
        problem.other_bytes + sum(map(bytes_of, each))
        for each in (
            (min(unit, key=bytes_of) for unit in problem.units),
            (max(unit[1:] or unit, key=bytes_of) for unit in problem.units),  # the first is full precision
        )
    )
    found = []
    for step in range(count):
        limit = low + math.ceil((high - low) * step / (count - 1))
        budget = Budget.of(problem, "size", max_bytes=limit)
        assert budget is not None  # which it is only without a limit
        found.append(plan_optimal(problem, budget, _SECONDS))
    return list({repr((one.specs, one.activations)): one for one in found}.values())


def uniform_plans(sensitivities: Sensitivities, **choices: Any) -> dict[str, Plan]:
    """Return the uniform plan in each spec that was measured on every layer that may have it, by the spec's text.

    ``choices`` as for ``front_plans``. There is none if they leave no layer free, nor, under ``servable``, in a spec
    that other engines do not run.
    """
    problem = Problem.of(sensitivities, **choices)
    trials = uniform_trials(problem).items()
    return {str(spec): as_plan(problem, picks, spec) for spec, picks in trials if spec is not None}


def full_precision(sensitivities: Sensitivities, **choices: Any) -> Plan:
    """Return the plan that leaves all layers as they are; ``choices`` as for ``front_plans``."""
    problem = Problem.of(sensitivities, **choices)
    return replace(problem.plan(problem.full, "uniform"), notes=())  # which are on what others choose
