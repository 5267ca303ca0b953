"""Definition of ops: a torch.library schema each, with its checks, a fake, the reference, and kernels by device.

Kernels register by dispatch key (klfast/backends); where a device has none, the reference runs with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
from klfast.dispatch.checks import check_writable, no_memory

NAMESPACE = __name__.partition(".")[0]  # another one in an exported copy (integrations/hub_repository.py)
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_checks: dict[str, Callable[..., Sequence[Any]]] = {}
_runs: dict[str, Callable[..., Any]] = {}
_references: dict[str, Callable[..., Any]] = {}
_kernels: dict[tuple[str, str], Callable[..., Any]] = {}
_handed_over: dict[tuple[str, str], Callable[..., str]] = {}
_see_addresses: set[tuple[str, str]] = set()
_unavailable: dict[tuple[str, str], str] = {}
_formats_of: dict[str, Callable[..., Iterable[str]]] = {}
_kernel_formats: dict[tuple[str, str], frozenset[str]] = {}


def op_names() -> list[str]:
    """Return all ops in order of definition."""
    return list(_references)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Return True if a device ("CPU", "CUDA", "XPU") has a kernel of an op."""
    return (name, dispatch_key) in _kernels


def kernel_formats(name: str, dispatch_key: str) -> frozenset[str]:
    """Return the quantization formats that a device's kernel of an op takes; none without a kernel."""
    return _kernel_formats.get((name, dispatch_key), frozenset())


@contextmanager
def only_formats(name: str, dispatch_key: str, formats: Iterable[str]) -> Iterator[None]:
    """Let a device's kernel of an op take only some formats in this block."""
    at = name, dispatch_key
    before = _kernel_formats[at]
    _kernel_formats[at] = before.intersection(formats)
    try:
        yield
    finally:
        _kernel_formats[at] = before


def why_no_format(name: str, dispatch_key: str, formats: Iterable[str]) -> str:
    """Return why a device's kernel of an op does not take weights in some formats: one sentence; empty if it does."""
    taken = kernel_formats(name, dispatch_key)
    lacking = [each for each in formats if each not in taken]
    return f"klfast's {dispatch_key.lower()} kernel of this op does not take {lacking[0]} weights." if lacking else ""


def unavailable(dispatch_key: str, reason: str, *names: str) -> None:
    """Record why a device lacks kernels of some ops (all without ``names``): one sentence, for warnings and reports."""
    for name in names or ("",):
        _unavailable[name, dispatch_key] = reason


def why_no_kernel(device: str, name: str = "") -> str:
    """Return why a device type ("cuda") has no kernel of an op, or of any: one sentence."""
    key = device.upper()
    return _unavailable.get((name, key)) or _unavailable.get(("", key)) or f"klfast has no {device} kernel of this op."


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Callable[..., Any] | None = None,
    formats: Callable[..., Iterable[str]] | None = None,
) -> torch._ops.OpOverload:
    """Define an op and return it.

    ``check`` raises InvalidInputError for invalid arguments. It runs first on every path: before ``fake`` (shape
    inference), before a kernel, and before ``reference`` (used where no kernel is registered). Whatever the schema
    implies is checked here: required tensors are given, all have memory, and those written to are writable.

    Args:
        schema: of torch.library.
        check: see above; takes the op's arguments, as do the other functions and the kernels.
        fake: see above.
        reference: see above.
        arguments: makes one object of the schema's arguments, which ``check`` and all others then take instead.
        formats: returns the quantization formats of the weights among the arguments; where a kernel does not take them
            (``register_kernel``), the reference runs.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    declared = schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")
    parsed = [(i, *argument.rpartition(" ")) for i, argument in enumerate(declared)]
    tensors = [(i, kind, argument) for i, kind, _, argument in parsed if kind.startswith("Tensor")]
    required = tuple((i, argument) for i, kind, argument in tensors if kind[-1] not in "?]")
    singles = tuple((i, argument) for i, kind, argument in tensors if kind != "Tensor[]")
    lists = tuple((i, argument) for i, kind, argument in tensors if kind == "Tensor[]")
    written = tuple((i, argument) for i, kind, argument in tensors if "!" in kind)

    def checked(args: Sequence[Any]) -> Sequence[Any]:
        """Check the op's arguments and return them as kernels take them."""
        for i, argument in required:
            if args[i] is None:  # torch accepts it
                raise InvalidInputError(f"{name}: {argument} must be a tensor, got None")
        given = args if arguments is None else (arguments(*args),)
        check(*given)
        return given

    def require_memory(args: Sequence[Any]) -> None:
        for i, argument in singles:
            t = args[i]
            if t is not None and not t.data_ptr() and t.numel():
                raise InvalidInputError(no_memory(name, argument, t))
        for i, argument in lists:
            for t in args[i]:
                if not t.data_ptr() and t.numel():
                    raise InvalidInputError(no_memory(name, argument, t))

    def run(function: Callable[..., Any], args: Sequence[Any], given: Sequence[Any], sees_addresses: bool) -> Any:
        """Run a kernel, or the reference."""
        for i, argument in written:
            if args[i] is not None:
                check_writable(name, argument, args[i])
        if not sees_addresses:
            require_memory(args)
            return function(*given)
        try:
            return function(*given)
        except InvalidInputError:
            require_memory(args)  # its message names the argument
            raise

    def checked_fake(*args: Any) -> Any:
        return fake(*checked(args))

    def negated(*args: Any) -> Any:
        """Resolve views such as z.conj().imag: torch's own fallback fails where an op writes to one."""
        for i, argument in written:
            if args[i] is not None and args[i].is_neg():
                raise InvalidInputError(
                    f"{name}: {argument} is written in place and must not be a negated view; "
                    f"pass {argument}.resolve_neg()"
                )
        return op(*(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args))

    def without_kernel(*args: Any) -> Any:
        every = list(_tensors_in(args))
        for i, _, argument in tensors:
            for t in _tensors_in(args[i : i + 1]):
                if t.layout is not torch.strided:
                    raise InvalidInputError(
                        f"{name}: {argument} must be a dense tensor, got layout {t.layout}; call .to_dense() first"
                    )
        given = checked(args)
        first = every[0]
        if pins.pinned() != "reference":
            pins.slow_path(name, list(first.shape), why_no_kernel(first.device.type, name))
        known = all(t.is_cpu or t.is_cuda or t.is_xpu for t in every)
        return run(reference, args, given, False) if known else reference(*given)

    _checks[name], _runs[name], _references[name] = checked, run, reference
    if formats is not None:
        _formats_of[name] = formats
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_fake, lib=LIBRARY)
    LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")
    if written:
        LIBRARY.impl(name, negated, "Negative")
    return op


def register_kernel(
    name: str,
    dispatch_key: str,
    kernel: Callable[..., Any],
    *,
    handed_over: Callable[..., str] | None = None,
    sees_addresses: bool = False,
    formats: Iterable[str] = (),
) -> None:
    """Register a device's kernel of an op; ``klfast.using("reference")`` still bypasses it.

    On the CPU it takes aliases of parameters: another thread that moves a module gives its parameters other memory, and
    would free what the kernel reads. ``data`` makes them under the GIL; ``detach()`` releases it, and copies a
    reference that the other thread may be exchanging.

    Args:
        name: the op.
        dispatch_key: the device.
        kernel: takes the op's arguments.
        handed_over: takes the public function's arguments and returns why the kernel leaves the call to torch, empty if
            it does not. The kernel itself decides by it, and ``klfast.explain`` reports it.
        sees_addresses: the kernel takes the addresses of all tensors before it reads any, which raises for one without
            memory (klfast/backends/cpu/extension.py). A separate check would cost a small op more than a microsecond.
        formats: names of the quantization formats that it takes; for an op with quantized weights.
    """
    check, run, formats_of = _checks[name], _runs[name], _formats_of.get(name)
    at = name, dispatch_key
    _kernels[at] = kernel
    _kernel_formats[at] = frozenset(formats)
    if handed_over is not None:
        _handed_over[at] = handed_over
    if sees_addresses:
        _see_addresses.add(at)

    def dispatched(*args: Any) -> Any:
        if dispatch_key == "CPU":
            args = tuple([a.data if type(a) is torch.nn.Parameter else a for a in args])  # see above
        given = check(args)
        if pins.pinned() is None and (formats_of is None or _kernel_formats[at].issuperset(formats_of(*given))):
            return run(kernel, args, given, sees_addresses)  # without the lookups below
        key, function = implementation(name, dispatch_key)
        if formats_of is not None and key and (why := why_no_format(name, key, formats_of(*given))):
            pins.slow_path(name, list(next(_tensors_in(args)).shape), why)
            key, function = "", _references[name]
        return run(function, args, given, (name, key) in _see_addresses)

    LIBRARY.impl(name, dispatched, dispatch_key)


def implementation(name: str, dispatch_key: str, formats: Iterable[str] = ()) -> tuple[str, Callable[..., Any]]:
    """Return what runs an op now, for weights in some formats: the kernel's key ("" for the reference) and function."""
    pin = pins.pinned()
    if pin == "reference" or (name, dispatch_key) not in _kernels:
        return "", _references[name]
    if pin == "triton" and dispatch_key == "CPU" and pins.interprets_triton() and (name, "CUDA") in _kernels:
        dispatch_key = "CUDA"
    if formats and why_no_format(name, dispatch_key, formats):
        return "", _references[name]
    return dispatch_key, _kernels[name, dispatch_key]


def _tensors_in(args: Iterable[object]) -> Iterator[torch.Tensor]:
    """Yield the tensors among arguments, those in lists too."""
    for argument in args:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from argument


def handed_over(name: str, dispatch_key: str, *args: object) -> str:
    """Return why an op's kernel leaves a public function's call with these arguments to torch; empty if it does not."""
    why = _handed_over.get((name, dispatch_key))
    return "" if why is None else why(*args)
