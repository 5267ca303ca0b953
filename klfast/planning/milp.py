"""HiGHS (scipy's MILP) for knapsacks that are too hard for the exact solver of klfast.planning.optimal.

HiGHS has absolute tolerances of 1e-6, so objective and limit are scaled to 1e4 and each answer's true sum is checked.
It is the second choice because it has missed the optimum where many sums are within 1e-9 of the limit, and is some ten
times slower on real sensitivities.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence

from klfast.core.errors import KlfastError
from klfast.planning import highs

_GRACE = 60.0  # seconds beyond the time limit for the process to start and for HiGHS to notice the limit


def solve_milp(
    options: Sequence[Sequence[tuple[float, float]]],
    kept: list[list[int]],
    limit: float,
    upper: float,
    time_limit: float,
) -> tuple[list[int] | None, bool]:
    """Return the best solution found among the kept options (None if none), and True if it is proven optimal.

    Raises:
        KlfastError: the process that runs HiGHS failed.
    """
    request = {
        "path": sys.path,
        "options": [[options[n][i] for i in front] for n, front in enumerate(kept)],
        "limit": limit,
        "upper": upper,
        "seconds": min(time_limit, 1e9),  # JSON lacks infinity
    }
    timeout = time_limit + _GRACE if math.isfinite(time_limit) else None
    try:
        done = subprocess.run(
            [sys.executable, highs.__file__],
            input=json.dumps(request, default=float),
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return None, False
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KlfastError(f"HiGHS failed on a plan too hard for the exact solver ({last}); use method='greedy'")
    picks, proven = json.loads(done.stdout)
    return picks and [kept[n][i] for n, i in enumerate(picks)], proven
