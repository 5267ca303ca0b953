"""Runs the cases of ops against their references, as doctor does."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Largest errors, relative to the reference's largest value, by what the results are rounded to: the reference is
# rounded, too, and may be one unit in the last place away.
from klfast.benchkit.op_cases import Case, badness
from klfast.core.errors import SlowPathWarning, one_line


@dataclass(frozen=True)
class Outcome:
    """What cases gave.

    Attributes:
        cases: how many there were.
        error: the largest of them in units of its tolerance; NaN if a result was, or none came.
        tolerance: of that case.
        worst: which case it was.
        faults: "case: what is wrong", of each that failed.
    """

    cases: int
    error: float
    tolerance: float
    worst: str
    faults: tuple[str, ...]


def run(
    some: Sequence[Case], tier: str | None = None, device: str = "cpu", tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Run cases as ``Case.error`` does; none that fails ends the run. ``tell`` gets the name of each before it runs."""
    faults, errors = [], [(float("-inf"), float("nan"), float("nan"), "")]
    for case in some:
        tell(f"{case.kernel}, {case.what}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowPathWarning)  # a kernel that goes another way is none
                error = case.error(tier, device)
        except Exception as failure:  # whatever it is (a compiler's, a driver's), the report has to name it
            faults.append(f"{case.what}: {one_line(failure)}")
            continue
        if not error <= case.tolerance:
            faults.append(f"{case.what}: off by {error:.1e}, allowed are {case.tolerance:.0e}")
        errors.append((error / case.tolerance, error, case.tolerance, case.what))
    return Outcome(len(some), *max(errors, key=lambda found: badness(found[0]))[1:], tuple(faults))
