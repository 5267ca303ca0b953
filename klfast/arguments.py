"""Checks of numeric arguments, with one line that says what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

from klfast.errors import InvalidInputError

_LARGEST = 2**63 - 1  # what torch can hold


def integer(name: str, value: object, least: int) -> int:
    """``value`` as an int of ``least`` or more; a bool, a float or a number beyond 64 bits raises InvalidInputError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InvalidInputError(f"{name} must be an integer, {least} or more, got {value!r}")
    if value > _LARGEST:
        raise InvalidInputError(f"{name} must fit into 64 bits, got {value!r}")
    return int(value)


def number(name: str, value: object, holds: Callable[[float], bool], wanted: str) -> float:
    """``value`` as a finite float for which ``holds``; a bool or anything else raises InvalidInputError."""
    try:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and holds(found)):
        raise InvalidInputError(f"{name} must be {wanted}, got {value!r}")
    return found
