"""Dtypes and devices as users write them."""

from __future__ import annotations

from typing import Literal

import torch

from klfast.core import machine
from klfast.core.errors import InvalidInputError

DTYPES: dict[str, torch.dtype | Literal["auto"]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}


def as_dtype(given: str | torch.dtype) -> torch.dtype | Literal["auto"]:
    """Return the torch dtype that is given, itself or by name; "auto" stays "auto".

    Raises:
        InvalidInputError: another dtype than float32, bfloat16 and float16.
    """
    if isinstance(given, torch.dtype) and given in DTYPES.values():
        return given
    if not isinstance(given, str) or given not in DTYPES:
        raise InvalidInputError(f"dtype must be one of {', '.join(DTYPES)}, got {given!r}")
    return DTYPES[given]


def as_device(name: torch.device | str) -> torch.device:
    """Return the device of that name, which this machine can use.

    Raises:
        InvalidInputError: an unknown device type.
        KernelUnavailableError: torch finds no device of that type.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InvalidInputError(f"unknown device {name!r}; write cpu, cuda or xpu") from None
    machine.require(device.type)
    return device
