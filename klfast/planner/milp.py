"""HiGHS (scipy's MILP) for knapsacks that are too hard for the exact solver of klfast.planner.optimal.

HiGHS works with absolute tolerances of 1e-6, so objective and limit are scaled to 1e4 and each answer's true sum is
checked afterwards. Where many sums fall within 1e-9 of the limit it has been seen to miss the optimum, and it is some
ten times slower on real sensitivities: hence the second choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

_SCALE = 1e4
_LEEWAY = 1e-9  # of the limit, given to HiGHS so that its tolerances cut off nothing that fits exactly
_TIE_BREAK = 1e-8  # of the objective goes to the weights: of equally good solutions, the one that uses less of the budget
_MAX_CUTS = 50


def solve_milp(
    options: Sequence[Sequence[tuple[float, float]]], kept: list[list[int]], limit: float, upper: float, time_limit: float
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
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(load[None], -np.inf, _SCALE * (1 + _LEEWAY) if room > 0 else 0.0)]
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
        if math.fsum(options[n][i][1] for n, i in enumerate(picks)) <= limit:
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
