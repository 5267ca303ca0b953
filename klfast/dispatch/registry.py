"""Definition of ops: a torch.library schema each, with its checks, a fake, the reference, and kernels by device.

Kernels register by dispatch key (klfast/backends); where a device has none, the reference runs with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
from klfast.dispatch.checks import check_writable, no_memory

LIBRARY = torch.library.Library("klfast", "DEF")
_checks: dict[str, Callable[..., None]] = {}
_runs: dict[str, Callable[..., Any]] = {}
_references: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}
_handed_over: dict[tuple[str, str], Callable[..., str]] = {}
_see_addresses: set[tuple[str, str]] = set()
_unavailable: dict[tuple[str, str], str] = {}


def op_names() -> list[str]:
    """Return all ops in order of definition."""
    return list(_references)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Return True if a device ("CPU", "CUDA", "XPU") has a kernel of an op."""
    return (name, dispatch_key) in _kernels


def unavailable(dispatch_key: str, reason: str, *names: str) -> None:
    """Record why a device lacks kernels of some ops (all without ``names``): one sentence, for warnings and reports."""
    for name in names or ("",):
        _unavailable[name, dispatch_key] = reason


def why_no_kernel(device: str, name: str = "") -> str:
    """Return why a device type ("cuda") has no kernel of an op, or of any: one sentence."""
    key = device.upper()
    return _unavailable.get((name, key)) or _unavailable.get(("", key)) or f"klfast has no {device} kernel of this op."


def define(schema: str, *, check: Callable[..., None], fake: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Define an op.

    ``check`` raises InvalidInputError for invalid arguments. It runs first on every path: before ``fake`` (shape
    inference), before a kernel, and before ``reference`` (used where no kernel is registered). Whatever the schema
    implies is checked here: required tensors are given, all have memory, and those written to are writable.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    arguments = schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")
    parsed = [(i, *argument.rpartition(" ")) for i, argument in enumerate(arguments)]
    tensors = [(i, kind, argument) for i, kind, _, argument in parsed if kind.startswith("Tensor")]
    required = tuple((i, argument) for i, kind, argument in tensors if not kind.endswith("?"))
    written = tuple((i, argument) for i, kind, argument in tensors if "!" in kind)

    def checked(*args: Any) -> None:
        for i, argument in required:
            if args[i] is None:  # torch accepts it
                raise InvalidInputError(f"{name}: {argument} must be a tensor, got None")
        check(*args)

    def require_memory(*args: Any) -> None:
        for i, _, argument in tensors:
            t = args[i]
            if t is not None and not t.data_ptr() and t.numel():
                raise InvalidInputError(no_memory(name, argument, t))

    def run(key: str, function: Callable[..., Any], *args: Any) -> Any:
        """Run a kernel, or the reference (key "")."""
        for i, argument in written:
            if args[i] is not None:
                check_writable(name, argument, args[i])
        if (name, key) not in _see_addresses:
            require_memory(*args)
            return function(*args)
        try:
            return function(*args)
        except InvalidInputError:
            require_memory(*args)  # its message names the argument
            raise

    def checked_fake(*args: Any) -> Any:
        checked(*args)
        return fake(*args)

    def negated(*args: Any) -> Any:
        """Resolve views such as z.conj().imag: torch's own fallback fails where an op writes to one."""
        for i, argument in written:
            if args[i] is not None and args[i].is_neg():
                raise InvalidInputError(
                    f"{name}: {argument} is written in place and must not be a negated view; "
                    f"pass {argument}.resolve_neg()"
                )
        return getattr(torch.ops.klfast, name).default(
            *(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args)
        )

    def without_kernel(*args: Any) -> Any:
        for i, _, argument in tensors:
            if args[i] is not None and args[i].layout is not torch.strided:
                raise InvalidInputError(
                    f"{name}: {argument} must be a dense tensor, got layout {args[i].layout}; call .to_dense() first"
                )
        checked(*args)
        first = next(a for a in args if isinstance(a, torch.Tensor))
        if pins.pinned() != "reference":
            pins.slow_path(name, list(first.shape), why_no_kernel(first.device.type, name))
        known = all(t is None or t.is_cpu or t.is_cuda or t.is_xpu for t in (args[i] for i, *_ in tensors))
        return run("", reference, *args) if known else reference(*args)

    _checks[name], _runs[name], _references[name] = checked, run, reference
    torch.library.register_fake(f"klfast::{name}", checked_fake, lib=LIBRARY)
    LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")
    if written:
        LIBRARY.impl(name, negated, "Negative")


def register_kernel(
    name: str,
    dispatch_key: str,
    kernel: Callable[..., Any],
    *,
    handed_over: Callable[..., str] | None = None,
    sees_addresses: bool = False,
) -> None:
    """Register a device's kernel of an op; ``klfast.using("reference")`` still bypasses it.

    Args:
        name: the op.
        dispatch_key: the device.
        kernel: takes the op's arguments.
        handed_over: takes the public function's arguments and returns why the kernel leaves the call to torch, empty if
            it does not. The kernel itself decides by it, and ``klfast.explain`` reports it.
        sees_addresses: the kernel takes the addresses of all tensors before it reads any, which raises for one without
            memory (klfast/backends/cpu/extension.py). A separate check would cost a small op more than a microsecond.
    """
    check, run = _checks[name], _runs[name]
    _kernels[name, dispatch_key] = kernel
    if handed_over is not None:
        _handed_over[name, dispatch_key] = handed_over
    if sees_addresses:
        _see_addresses.add((name, dispatch_key))

    def dispatched(*args: Any) -> Any:
        check(*args)
        return run(*implementation(name, dispatch_key), *args)

    LIBRARY.impl(name, dispatched, dispatch_key)


def implementation(name: str, dispatch_key: str) -> tuple[str, Callable[..., Any]]:
    """Return what runs an op on a device now: the kernel's key ("" for the reference) and function."""
    pin = pins.pinned()
    if pin == "reference" or (name, dispatch_key) not in _kernels:
        return "", _references[name]
    if pin == "triton" and dispatch_key == "CPU" and pins.interprets_triton() and (name, "CUDA") in _kernels:
        dispatch_key = "CUDA"
    return dispatch_key, _kernels[name, dispatch_key]


def handed_over(name: str, dispatch_key: str, *args: object) -> str:
    """Return why an op's kernel leaves a public function's call with these arguments to torch; empty if it does not."""
    why = _handed_over.get((name, dispatch_key))
    return "" if why is None else why(*args)
