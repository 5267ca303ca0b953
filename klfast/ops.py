"""Every op of klfast: its schema, its argument checks, its fake (for torch.compile) and its public wrapper.

An op is registered once with torch.library. Kernels register by dispatch key (klfast/backends); where a device has
none, the reference runs and says so. The checks serve the wrapper, the fake and so every way into the op.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from klfast import reference, runtime
from klfast.errors import InvalidInputError
from klfast.types import FLOAT_DTYPES, Layout, QuantizedTensor, QuantSpec

LIBRARY = torch.library.Library("klfast", "DEF")
_references: dict[str, Callable] = {}


def _define(schema: str, *, fake: Callable, reference: Callable) -> None:
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

    def dispatched(*args):
        return plain(*args) if runtime.pinned() == "reference" else kernel(*args)

    LIBRARY.impl(name, dispatched, dispatch_key)


def same_device(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise unless all tensors given are on the first one's device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise InvalidInputError(f"{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


# dequant_matmul ---------------------------------------------------------------------------------------------------


def _check_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    if x.dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"dequant_matmul: x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise InvalidInputError(f"dequant_matmul: x must be [..., {k}] for a [{n}, {k}] weight, got {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise InvalidInputError(f"dequant_matmul: bias must have shape [{n}], got {list(bias.shape)}")
    if activation not in ("exact", "int8"):
        raise InvalidInputError(f'dequant_matmul: activation must be "exact" or "int8", got {activation!r}')
    same_device("dequant_matmul", x, packed, scale, zero_point, bias)


def _fake_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    _check_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation)
    return x.new_empty((*x.shape[:-1], n))


def _reference_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    spec = QuantSpec(bits, group_size, zero_point is None)
    return reference.dequant_matmul(x, QuantizedTensor(packed, scale, zero_point, (n, k), spec, Layout(layout)), bias, activation)


_define(
    "dequant_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int n, int k, int bits, int group_size, str layout, str activation) -> Tensor",
    fake=_fake_dequant_matmul,
    reference=_reference_dequant_matmul,
)


def dequant_matmul(x: torch.Tensor, qt: QuantizedTensor, bias: torch.Tensor | None = None, *, activation: str = "exact") -> torch.Tensor:
    """Linear layer with a quantized weight: ``x @ qt.dequantize(torch.float32).T + bias``, accumulated in float32.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        qt: quantized [N, K], on x's device.
        bias: float [N], optional.
        activation: "exact" rounds nothing; "int8" rounds x per row and weight group to int8, symmetric (max|x| / 127).

    Returns:
        [..., N] in x's dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation.
    """
    args = (x, qt.packed, qt.scale, qt.zero_point, bias, *qt.shape, qt.spec.bits, qt.spec.group_size, qt.layout.value, activation)
    _check_dequant_matmul(*args)
    return torch.ops.klfast.dequant_matmul.default(*args)


# Kernels by device. The extension may be missing (a source tree that was not built): the reference then runs, with a
# warning, so that importing klfast never needs a compiler.
try:
    from klfast.backends import cpu as _cpu
except ImportError as _error:
    _missing = str(_error)
else:
    _cpu.register()
