"""Plans of many sizes: the front of what sensitivities allow."""

from __future__ import annotations

import math
from typing import Any

from klfast.core.errors import InvalidInputError
from klfast.planning import plan
from klfast.planning.plan_file import Plan
from klfast.planning.problem import Problem
from klfast.sensitivity.coverage import require_measurements
from klfast.sensitivity.results import Sensitivities

_SECONDS = 5.0  # for each plan; far more than most need
_ANY = 1e30  # of KL, or of bytes


def front_plans(sensitivities: Sensitivities, count: int = 20, **choices: Any) -> list[Plan]:
    """Return plans of about ``count`` sizes, evenly from the smallest plan to the largest measured specs; no two alike.

    Args:
        sensitivities: as for ``klfast.plan``.
        count: of plans, 2 or more.
        choices: arguments of ``klfast.plan`` beside the budget.

    Raises:
        InvalidInputError: ``count`` is too small, or as ``klfast.plan``.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise InvalidInputError(f"a front has 2 plans or more, not {count!r}")
    require_measurements(sensitivities)
    smallest = plan(sensitivities, max_kl=_ANY, **choices)
    low, high = int(smallest.predicted["bytes"]), _largest(sensitivities)
    budgets = [low + math.ceil((high - low) * i / (count - 1)) for i in range(count)] if high > low else [low]
    found = [plan(sensitivities, budget, time_limit=_SECONDS, **choices) for budget in budgets]
    return list({repr((one.specs, one.activations)): one for one in found}.values())


def uniform_plans(sensitivities: Sensitivities, **choices: Any) -> dict[str, Plan]:
    """Return the uniform plan in each spec that was measured, by its text; ``choices`` as for ``front_plans``."""
    specs = sorted({spec for _, spec in sensitivities.measurements})
    return {str(spec): plan(sensitivities, method="uniform", spec=spec, **choices) for spec in specs}


def full_precision(sensitivities: Sensitivities) -> Plan:
    """Return the plan that leaves all layers as they are."""
    problem = Problem(sensitivities, None)
    return problem.plan(problem.full, "uniform")


def _largest(sensitivities: Sensitivities) -> int:
    """Return the bytes of the model with each layer in its largest measured spec."""
    sizes: dict[str, int] = {}
    for name, spec in sensitivities.measurements:
        sizes[name] = max(sizes.get(name, 0), spec.saved_bytes(sensitivities.layers[name].shape))
    left = sum(info.float_bytes for name, info in sensitivities.layers.items() if name not in sizes)
    return sensitivities.other_bytes + left + sum(sizes.values())
