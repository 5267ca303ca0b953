"""What a model is computed in and where: dtypes and devices as users write them."""

from __future__ import annotations

import torch

from klfast.core import machine
from klfast.core.errors import InvalidInputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def as_dtype(name: str) -> torch.dtype | str:
    """The torch dtype of that name; "auto" stays "auto"."""
    if not isinstance(name, str) or name not in DTYPES:
        raise InvalidInputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def as_device(name: torch.device | str) -> torch.device:
    """A device that this machine can use.

    Raises:
        InvalidInputError: there is no such kind of device.
        KernelUnavailableError: torch finds none of that kind.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InvalidInputError(f"there is no device called {name!r}; write cpu, cuda or xpu") from None
    machine.require(device.type)
    return device
