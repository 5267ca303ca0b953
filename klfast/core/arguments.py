"""Values that users give, checked; one line says what is wanted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from numbers import Integral, Real

from klfast.core.errors import InvalidInputError

ACTIVATIONS = ("exact", "int8")  # what a quantized layer makes of its input, see klfast.dequant_matmul
_LARGEST = 2**63 - 1  # what torch can hold
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("kMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}


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


def check_activation(where: str, value: object) -> None:
    """Raise InvalidInputError unless ``value`` is one of ``ACTIVATIONS``; ``where`` begins the message."""
    if value not in ACTIVATIONS:
        raise InvalidInputError(f'{where}activation must be "exact" or "int8", got {value!r}')


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "3200000", "3.2MB" (powers of 1000) or "1.5GiB" (of 1024); InvalidInputError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
    if unit is None:
        raise InvalidInputError(f"{text!r} is not a size (examples: 3200000, 3.2MB, 1.5GiB)")
    size = float(match[1]) * _UNITS[unit]
    if size > _LARGEST:
        raise InvalidInputError("that is more bytes than any model has (examples: 3200000, 3.2MB, 1.5GiB)")
    return int(size)
