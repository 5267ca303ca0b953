"""Script that solves one multiple-choice knapsack with HiGHS (scipy's MILP) in a separate process.

Some versions of HiGHS (scipy 1.17 among them) print debugging lines on the process's standard output whatever their
options. In another process they cannot reach the caller's output, which need not be closed to all threads meanwhile.

Standard input: a JSON object with the arguments of ``solve`` and ``path``, the caller's sys.path. Standard output: the
result. Imports nothing of klfast, to start quickly.
"""

import json
import math
import os
import sys
import time

_SCALE = 1e4
_LEEWAY = 1e-9  # relative, added to the limit so that HiGHS's tolerances do not exclude what fits exactly
_TIE_BREAK = 1e-8  # the weights' share of the objective: of equally good solutions, the one that uses less budget wins
_MAX_CUTS = 50


def solve(
    options: list[list[tuple[float, float]]], limit: float, upper: float, seconds: float
) -> tuple[list[int] | None, bool]:
    """Return the best choice found for each layer (None if none), and True if it is proven optimal.

    Args:
        options: (value, weight) of each choice of each layer.
        limit: an upper limit on the sum of weights.
        upper: an upper bound on the sum of values.
        seconds: time limit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    deadline = time.monotonic() + seconds
    owner = np.array([n for n, layer in enumerate(options) for _ in layer])
    first = np.searchsorted(owner, np.arange(len(options)))
    value, weight = np.array([option for layer in options for option in layer], dtype=np.float64).T
    # Only differences within a layer matter: subtracting each layer's least keeps the digits of sums.
    base_value, base_weight = ([min(option[i] for option in layer) for layer in options] for i in (0, 1))
    value, weight = value - np.array(base_value)[owner], weight - np.array(base_weight)[owner]
    room = math.fsum([limit, *(-w for w in base_weight)])
    spread = math.fsum([upper, *(-v for v in base_value)])
    if spread <= 0 or room < 0:
        return None, True
    load = weight * (_SCALE / room) if room > 0 else np.where(weight > 0, _SCALE, 0.0)
    objective = value * (_SCALE / spread) + load * _TIE_BREAK
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(options), len(owner)))
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(load[None], -np.inf, _SCALE * (1 + _LEEWAY) if room > 0 else 0.0),
    ]
    for _ in range(_MAX_CUTS):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        result = milp(
            objective,
            integrality=np.ones(len(owner)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0, "time_limit": left},
        )
        if result.x is None:
            return None, result.status == 2  # 2: infeasible, which only cuts can cause
        chosen = [max(np.flatnonzero(owner == n), key=lambda j: result.x[j]) for n in range(len(options))]
        picks = [int(j - first[n]) for n, j in enumerate(chosen)]
        if math.fsum(options[n][i][1] for n, i in enumerate(picks)) <= limit:
            return picks, result.status == 0
        # Over the limit by less than the solver's tolerance: exclude this solution and go on.
        cut = np.zeros(len(owner))
        cut[chosen] = 1.0
        constraints.append(LinearConstraint(cut[None], -np.inf, len(options) - 1))
    return None, False


if __name__ == "__main__":
    request = json.load(sys.stdin)
    sys.path[:] = request.pop("path")
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    found = solve(**request)
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(found, file)
