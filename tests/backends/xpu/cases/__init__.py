"""Launches of every kernel and their float64 results: of the shipped sizes' kind, and with ragged ends.

Sizes that Triton compiles in (multiples of 16, ones) are of the same kind as those of triton_launches, so that most of
these cases run the same SPIR-V as the shipped sizes, with less work.
"""

from xpu.cases import attention, convolution, delta_rule, divergence, matmul, norm, scan
from xpu.cases.case import Case

_FAMILIES = (matmul, divergence, convolution, scan, delta_rule, norm, attention)


def cases() -> list[Case]:
    """Return all cases, sorted by group."""
    return sorted((case for family in _FAMILIES for case in family.cases()), key=lambda case: case.group)
