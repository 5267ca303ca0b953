"""One op on small operands, and how far its result may lie from float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from triton_launches import FLOATS

ROUNDING = {
    dtype: torch.finfo(dtype).eps / 2 + 1e-5 for dtype in FLOATS.values()
}  # of the largest value: storing y, float32 sums


@dataclass(frozen=True)
class Case:
    """One op on small operands.

    Attributes:
        group: op and dtype, for the report.
        name: of the case in it.
        error: runs it and gives its largest error.
        allowed: how large that may be.
        cores: of the device that the launches are planned for; more split the work into more parts.
    """

    group: str
    name: str
    error: Callable[[], float]
    allowed: float
    cores: int = 1


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest error, relative to the largest value; NaN counts as infinite."""
    assert found.shape == truth.shape
    return float(((found.double() - truth).abs().max() / truth.abs().max()).nan_to_num(nan=math.inf))
