"""Functions shared by the state-space kernels."""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """Return x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    """Return log(1 + e^x) to a few ulps for any x: max(x, 0) + log(1 + e^-|x|) by the series of atanh."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)  # at most 1 / 3
    s2 = s * s
    poly = s2 * (1.0 / 13.0) + 1.0 / 11.0
    poly = poly * s2 + 1.0 / 9.0
    poly = poly * s2 + 1.0 / 7.0
    poly = poly * s2 + 1.0 / 5.0
    poly = poly * s2 + 1.0 / 3.0
    return tl.maximum(x, 0.0) + 2.0 * (s + s * s2 * poly)


@triton.jit
def at_least(x, low):
    """Return the larger one, or NaN if x is NaN, for which a GPU's plain maximum would return ``low``."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, high):
    """Return the smaller one, or NaN if x is NaN."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_state(slot, padding, count):
    """Return True if a slot is one of ``count`` states, not that of entries without one."""
    return (slot >= 0) & (slot < count) & (slot != padding)


@triton.jit
def of_slot(y, slot, padding, count):
    """Return the outputs y of an entry with a state; zeros for padding, NaN for a slot that does not exist."""
    y = tl.where(is_state(slot, padding, count), y, float("nan"))
    return tl.where(slot == padding, 0.0, y)


NO_LIMIT = (-math.inf, math.inf)
