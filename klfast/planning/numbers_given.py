"""Validation of numbers from the user or a file."""

from __future__ import annotations

import contextlib
import math
import numbers

from klfast.core.errors import InvalidInputError


def require_number(name: str, value: object, least: float) -> float:
    """Return ``value`` as a float; raise InvalidInputError unless it is a finite number, at least ``least``."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the range of floats
            if least <= float(value) < math.inf:
                return float(value)
    raise InvalidInputError(f"{name} must be a finite number, at least {least:g}, got {shortened(value)}")


def shortened(value: object) -> str:
    """Return ``repr(value)`` for a message, truncated if it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of several thousand digits
        return "an integer that is too large"
    return text if len(text) < 100 else f"{text[:40]}..."
