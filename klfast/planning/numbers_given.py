"""Validation of numbers from the user or a file."""

from __future__ import annotations

import contextlib
import math
import numbers

from klfast.core.errors import InvalidInputError
from klfast.sensitivity.coverage import require_measurements
from klfast.sensitivity.results import Sensitivities

_ANY_SIZE = 2**63


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


def require_sizes(sensitivities: Sensitivities) -> None:
    """Raise InvalidInputError unless something was measured, on layers that exist and have a size."""
    require_measurements(sensitivities)
    for name, _ in sensitivities.measurements:
        if name not in sensitivities.layers:
            raise InvalidInputError(f"the sensitivities measure {name!r}, which is not among their layers; sweep again")
    sizes = [("what is never quantized", "bytes", sensitivities.other_bytes)]
    for name, info in sensitivities.layers.items():
        sizes += [(name, "bytes", info.float_bytes), *((name, "rows or columns", n) for n in info.shape)]
    for name, what, size in sizes:
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or not 0 <= size < _ANY_SIZE:
            raise InvalidInputError(f"the sensitivities are damaged: {name} has {shortened(size)} {what}; sweep again")
    if not any(math.prod(info.shape) for info in sensitivities.layers.values()):
        raise InvalidInputError("the layers of the sensitivities have no weights; sweep again")
