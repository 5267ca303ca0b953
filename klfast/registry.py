"""How an op comes to be: one torch.library schema, a fake with all checks, the reference, and kernels by device.

Kernels register by dispatch key (klfast/backends); where a device has none, the reference runs and says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from klfast import runtime
from klfast.errors import InvalidInputError

LIBRARY = torch.library.Library("klfast", "DEF")
_references: dict[str, Callable] = {}
_kernels: set[tuple[str, str]] = set()


def op_names() -> list[str]:
    """Every op, in order of definition."""
    return list(_references)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether a device ("CPU", "CUDA", "XPU") has a kernel of an op."""
    return (name, dispatch_key) in _kernels


def define(schema: str, *, fake: Callable, reference: Callable) -> None:
    """Define an op: ``fake`` checks and allocates, ``reference`` computes where no kernel is registered."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    torch.library.register_fake(f"klfast::{name}", fake, lib=LIBRARY)
    _references[name] = reference

    def without_kernel(*args):
        first = next(a for a in args if isinstance(a, torch.Tensor))
        if runtime.pinned() != "reference":
            runtime.slow_path(name, list(first.shape), f"klfast has no {first.device.type} kernel for it.")
        return reference(*args)

    LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")


def register_kernel(name: str, dispatch_key: str, kernel: Callable) -> None:
    """Register a device's kernel of an op; ``klfast.using("reference")`` still goes past it."""
    plain = _references[name]
    _kernels.add((name, dispatch_key))

    def dispatched(*args):
        return plain(*args) if runtime.pinned() == "reference" else kernel(*args)

    LIBRARY.impl(name, dispatched, dispatch_key)


def same_device(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors given are on the first one's device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InvalidInputError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
