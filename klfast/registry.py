"""How an op comes to be: one torch.library schema, its checks, a fake, the reference, and kernels by device.

Kernels register by dispatch key (klfast/backends); where a device has none, the reference runs and says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from klfast import runtime
from klfast.errors import InvalidInputError

LIBRARY = torch.library.Library("klfast", "DEF")
_checks: dict[str, Callable] = {}
_references: dict[str, Callable] = {}
_kernels: dict[tuple[str, str], Callable] = {}


def op_names() -> list[str]:
    """Every op, in order of definition."""
    return list(_references)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether a device ("CPU", "CUDA", "XPU") has a kernel of an op."""
    return (name, dispatch_key) in _kernels


def why_no_kernel(device: str) -> str:
    """Why an op has none for a type of device ("cuda"), one sentence."""
    if device in ("cuda", "xpu") and importlib.util.find_spec("triton") is None:
        remedy = "pip install klfast[triton]" if device == "cuda" else "PyTorch's XPU build brings it: docs/XPU.md"
        return f"Triton, which klfast's {device} kernels need, is not installed ({remedy})."
    return f"klfast has no {device} kernel of this op."


def define(schema: str, *, check: Callable, fake: Callable, reference: Callable) -> None:
    """Define an op.

    ``check`` raises InvalidInputError unless the op can take the arguments; whichever way a call comes, it runs before
    the rest: ``fake``, which allocates, and ``reference``, which computes where no kernel is registered.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    _checks[name], _references[name] = check, reference

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    def without_kernel(*args):
        check(*args)
        first = next(a for a in args if isinstance(a, torch.Tensor))
        if runtime.pinned() != "reference":
            runtime.slow_path(name, list(first.shape), why_no_kernel(first.device.type))
        return reference(*args)

    torch.library.register_fake(f"klfast::{name}", checked_fake, lib=LIBRARY)
    LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")


def register_kernel(name: str, dispatch_key: str, kernel: Callable) -> None:
    """Register a device's kernel of an op; ``klfast.using("reference")`` still goes past it."""
    check, plain = _checks[name], _references[name]
    _kernels[name, dispatch_key] = kernel

    def dispatched(*args):
        check(*args)
        pin = runtime.pinned()
        if pin == "reference":
            return plain(*args)
        if pin == "triton" and dispatch_key == "CPU" and runtime.interprets_triton():
            return _kernels.get((name, "CUDA"), kernel)(*args)
        return kernel(*args)

    LIBRARY.impl(name, dispatched, dispatch_key)


def same_device(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors given are on the first one's device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InvalidInputError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
