"""Numbers that the user or a file gives, checked."""

from __future__ import annotations

import contextlib
import math
import numbers

from klfast.core.errors import InvalidInputError


def require_number(name: str, value: object, least: float) -> float:
    """Return ``value`` as a float. InvalidInputError unless it is a finite number, at least ``least`` (a bool is not a number)."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond every float
            if least <= float(value) < math.inf:
                return float(value)
    raise InvalidInputError(f"{name} must be a finite number, at least {least:g}, got {shortened(value)}")


def shortened(value: object) -> str:
    """``repr(value)`` for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of several thousand digits
        return "an integer that is too large"
    return text if len(text) < 100 else f"{text[:40]}..."
