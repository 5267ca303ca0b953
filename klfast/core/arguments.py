"""Validation of numbers and choices that users pass."""

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
    """Return ``value`` as an int; raise InvalidInputError unless it is an integer of 64 bits, at least ``least``."""
    found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if found is None or found < least:
        raise InvalidInputError(f"{name} must be an integer, {least} or more, got {value!r}")
    if found > _LARGEST:
        raise InvalidInputError(f"{name} must fit into 64 bits, got {value!r}")
    return found


def number(name: str, value: object, holds: Callable[[float], bool], wanted: str) -> float:
    """Return ``value`` as a float; raise InvalidInputError unless it is finite and satisfies ``holds``."""
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
    """Return the bytes of a size such as "3200000", "3.2MB" (powers of 1000) or "1.5GiB" (powers of 1024).

    Raises:
        InvalidInputError: the text is not a size, or exceeds 64 bits.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise InvalidInputError(f"{text!r} is not a size (examples: 3200000, 3.2MB, 1.5GiB)")
    size = float(match[1]) * _UNITS[unit]
    if size > _LARGEST:
        raise InvalidInputError("that is more bytes than any model has (examples: 3200000, 3.2MB, 1.5GiB)")
    return int(size)
