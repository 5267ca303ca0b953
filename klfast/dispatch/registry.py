"""Definition of ops: one torch.library schema each, with its checks, a fake, the reference, and kernels by device.

Kernels register by dispatch key (klfast/backends); where a device has none, the reference runs and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from klfast.core.errors import InvalidInputError
from klfast.dispatch import pins
from klfast.dispatch.checks import check_writable, no_memory

LIBRARY = torch.library.Library("klfast", "DEF")
_checks: dict[str, Callable] = {}
_runs: dict[str, Callable] = {}
_references: dict[str, Callable] = {}
_kernels: dict[tuple[str, str], Callable] = {}
_handed_over: dict[tuple[str, str], Callable] = {}
_see_addresses: set[tuple[str, str]] = set()
_unavailable: dict[tuple[str, str], str] = {}
_formats_of: dict[str, Callable] = {}
_kernel_formats: dict[tuple[str, str], frozenset[str]] = {}


def op_names() -> list[str]:
    """Every op, in order of definition."""
    return list(_references)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether a device ("CPU", "CUDA", "XPU") has a kernel of an op."""
    return (name, dispatch_key) in _kernels


def kernel_formats(name: str, dispatch_key: str) -> frozenset[str]:
    """The quantization formats that a device's kernel of an op takes; none where it has no kernel."""
    return _kernel_formats.get((name, dispatch_key), frozenset())


def why_no_format(name: str, dispatch_key: str, formats: Iterable[str]) -> str:
    """Why a device's kernel of an op does not take weights in some formats: one sentence; empty if it does."""
    taken = kernel_formats(name, dispatch_key)
    lacking = [each for each in formats if each not in taken]
    return f"klfast's {dispatch_key.lower()} kernel of this op does not take {lacking[0]} weights." if lacking else ""


def unavailable(dispatch_key: str, reason: str, *names: str) -> None:
    """Record why a device has no kernel of some ops (all without ``names``): one sentence, for warnings and reports."""
    for name in names or ("",):
        _unavailable[name, dispatch_key] = reason


def why_no_kernel(device: str, name: str = "") -> str:
    """Why a type of device ("cuda") has no kernel of an op, or of any: one sentence."""
    key = device.upper()
    return _unavailable.get((name, key)) or _unavailable.get(("", key)) or f"klfast has no {device} kernel of this op."


def define(
    schema: str,
    *,
    check: Callable,
    fake: Callable,
    reference: Callable,
    arguments: Callable | None = None,
    formats: Callable[..., Iterable[str]] | None = None,
) -> None:
    """Define an op.

    ``check`` raises InvalidInputError unless the op can take the arguments. It runs first on every path: before ``fake``
    (shape inference), before a kernel, and before ``reference`` (used where no kernel is registered). What the schema
    implies is checked here: tensors that are not optional are given, all have memory, and those written to can be.

    Args:
        schema: of torch.library.
        check, fake, reference: see above; they take the op's arguments, as kernels do.
        arguments: makes one object of the schema's arguments, which ``check`` and all others then take instead.
        formats: the quantization formats of the weights among the arguments, which a kernel must take
            (``register_kernel``); where it does not, the reference runs.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    declared = schema[schema.index("(") + 1 : schema.index(") ->")].split(", ")
    tensors = [(i, *kind.rsplit(" ", 1)) for i, kind in enumerate(declared) if kind.startswith("Tensor")]
    required = tuple((i, argument) for i, kind, argument in tensors if kind[-1] not in "?]")
    singles = tuple((i, argument) for i, kind, argument in tensors if kind != "Tensor[]")
    lists = tuple((i, argument) for i, kind, argument in tensors if kind == "Tensor[]")
    written = tuple((i, argument) for i, kind, argument in tensors if "!" in kind)

    def checked(args):
        """The arguments as kernels take them."""
        for i, argument in required:
            if args[i] is None:  # torch lets it pass
                raise InvalidInputError(f"{name}: {argument} must be a tensor, got None")
        given = args if arguments is None else (arguments(*args),)
        check(*given)
        return given

    def has_memory(args):
        for i, argument in singles:
            t = args[i]
            if t is not None and not t.data_ptr() and t.numel():
                raise InvalidInputError(no_memory(name, argument, t))
        for i, argument in lists:
            for t in args[i]:
                if not t.data_ptr() and t.numel():
                    raise InvalidInputError(no_memory(name, argument, t))

    def run(key, function, args, given):
        """Run a kernel, or the reference (key "")."""
        for i, argument in written:
            if args[i] is not None:
                check_writable(name, argument, args[i])
        if (name, key) not in _see_addresses:
            has_memory(args)
            return function(*given)
        try:
            return function(*given)
        except InvalidInputError:
            has_memory(args)  # names the argument
            raise

    def checked_fake(*args):
        return fake(*checked(args))

    def negated(*args):  # views such as z.conj().imag: torch's own fallback fails where an op writes to one
        for i, argument in written:
            if args[i] is not None and args[i].is_neg():
                raise InvalidInputError(
                    f"{name}: {argument} is written in place and must not be a negated view; pass {argument}.resolve_neg()"
                )
        return getattr(torch.ops.klfast, name).default(
            *(a.resolve_neg() if isinstance(a, torch.Tensor) else a for a in args)
        )

    def without_kernel(*args):
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
        return run("", reference, args, given) if known else reference(*given)

    _checks[name], _runs[name], _references[name] = checked, run, reference
    if formats is not None:
        _formats_of[name] = formats
    torch.library.register_fake(f"klfast::{name}", checked_fake, lib=LIBRARY)
    LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")
    if written:
        LIBRARY.impl(name, negated, "Negative")


def register_kernel(
    name: str,
    dispatch_key: str,
    kernel: Callable,
    *,
    handed_over: Callable[..., str] | None = None,
    sees_addresses: bool = False,
    formats: Iterable[str] = (),
) -> None:
    """Register a device's kernel of an op; ``klfast.using("reference")`` still goes past it.

    Args:
        name, dispatch_key: of the op and the device.
        kernel: takes the op's arguments.
        handed_over: takes the public function's arguments and says why the kernel leaves the call to torch; empty if it
            does not. The kernel itself decides by it, and ``klfast.explain`` reports it.
        sees_addresses: it reads no tensor before it has taken the addresses of all (klfast/backends/cpu/extension.py), which raises for
            one without memory. A check before it would cost a small op more than a microsecond.
        formats: the quantization formats that it takes, by name; for an op with quantized weights.
    """
    check, run, formats_of = _checks[name], _runs[name], _formats_of.get(name)
    _kernels[name, dispatch_key] = kernel
    _kernel_formats[name, dispatch_key] = frozenset(formats)
    if handed_over is not None:
        _handed_over[name, dispatch_key] = handed_over
    if sees_addresses:
        _see_addresses.add((name, dispatch_key))

    def dispatched(*args):
        given = check(args)
        key, function = implementation(name, dispatch_key)
        if formats_of is not None and key and not _kernel_formats[name, key].issuperset(formats_of(*given)):
            shape = list(next(_tensors_in(args)).shape)
            pins.slow_path(name, shape, why_no_format(name, key, formats_of(*given)))
            key, function = "", _references[name]
        return run(key, function, args, given)

    LIBRARY.impl(name, dispatched, dispatch_key)


def implementation(name: str, dispatch_key: str, formats: Iterable[str] = ()) -> tuple[str, Callable]:
    """What runs an op on a device now, for weights in some formats: the key of the kernel, "" for the reference, and the function."""
    pin = pins.pinned()
    if pin == "reference" or (name, dispatch_key) not in _kernels:
        return "", _references[name]
    if pin == "triton" and dispatch_key == "CPU" and pins.interprets_triton() and (name, "CUDA") in _kernels:
        dispatch_key = "CUDA"
    if formats and why_no_format(name, dispatch_key, formats):
        return "", _references[name]
    return dispatch_key, _kernels[name, dispatch_key]


def _tensors_in(args: Iterable[object]) -> Iterator[torch.Tensor]:
    """The tensors among arguments, those in lists included."""
    for argument in args:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from argument


def handed_over(name: str, dispatch_key: str, *args: object) -> str:
    """Why an op's kernel leaves a call of the public function with these arguments to torch; empty if it does not."""
    why = _handed_over.get((name, dispatch_key))
    return "" if why is None else why(*args)
