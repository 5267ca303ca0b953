"""Runs of ops' cases against the reference, for doctor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from klfast.benchkit.op_cases import Case, badness
from klfast.core.errors import SlowPathWarning, one_line


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run of cases.

    Attributes:
        cases: their number.
        error: the largest error in units of its case's tolerance; NaN if a result was NaN or there were none.
        tolerance: the tolerance of that case.
        worst: the description of that case.
        faults: "case: fault" of each failed case.
    """

    cases: int
    error: float
    tolerance: float
    worst: str
    faults: tuple[str, ...]


def run(
    some: Sequence[Case], tier: str | None = None, device: str = "cpu", tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Run cases; a failing case does not stop the run. ``tell`` gets the name of each case before it runs."""
    faults, errors = [], [(float("-inf"), float("nan"), float("nan"), "")]
    for case in some:
        tell(f"{case.kernel}, {case.what}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowPathWarning)  # falling back counts as having no kernel
                error = case.error(tier, device)
        except Exception as failure:  # noqa: BLE001 (the report names it, be it a compiler's or a driver's)
            faults.append(f"{case.what}: {one_line(failure)}")
            continue
        if not error <= case.tolerance:
            faults.append(f"{case.what}: error {error:.1e} exceeds the tolerance {case.tolerance:.0e}")
        errors.append((error / case.tolerance, error, case.tolerance, case.what))
    return Outcome(len(some), *max(errors, key=lambda found: badness(found[0]))[1:], tuple(faults))
