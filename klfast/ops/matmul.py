"""Products with a quantized or a dense weight: dequant_matmul and linear."""

from __future__ import annotations

import torch

from klfast import reference
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.dispatch.checks import public, same_device
from klfast.dispatch.registry import define
from klfast.ops import transforms
from klfast.quant.layouts import check_tiled_parts
from klfast.quant.types import Layout, QuantizedTensor, QuantSpec, check_parts

# dequant_matmul ---------------------------------------------------------------------------------------------------

_LAYOUTS = tuple(layout.value for layout in Layout)


def _check_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    if x.dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"dequant_matmul: x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise InvalidInputError(f"dequant_matmul: x must be [..., {k}] for a [{n}, {k}] weight, got {list(x.shape)}")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOAT_DTYPES):
        raise InvalidInputError(
            f"dequant_matmul: bias must be float32, bfloat16 or float16 [{n}], got {bias.dtype} {list(bias.shape)}"
        )
    if activation not in ("exact", "int8"):
        raise InvalidInputError(f'dequant_matmul: activation must be "exact" or "int8", got {activation!r}')
    if bits not in (4, 8) or group_size == 0 or group_size < -1 or layout not in _LAYOUTS:
        raise InvalidInputError(
            f"dequant_matmul: bits={bits}, group_size={group_size}, layout={layout!r} is no quantization that it knows"
        )
    if layout == Layout.TILED.value:
        check_tiled_parts(packed, scale, zero_point, n, k, QuantSpec(bits, group_size, zero_point is None))
    else:
        check_parts(packed, scale, zero_point, n, k, bits, 1 if group_size == -1 and k else -(-k // abs(group_size)))
    same_device("dequant_matmul", x, packed, scale, zero_point, bias)


def _fake_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    return x.new_empty((*x.shape[:-1], n))


def _reference_dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    spec = QuantSpec(bits, group_size, zero_point is None)
    return reference.dequant_matmul(
        x, QuantizedTensor(packed, scale, zero_point, (n, k), spec, Layout(layout)), bias, activation
    )


define(
    "dequant_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, "
    "int n, int k, int bits, int group_size, str layout, str activation) -> Tensor",
    check=_check_dequant_matmul,
    fake=_fake_dequant_matmul,
    reference=_reference_dequant_matmul,
)
dequant_matmul_op = torch.ops.klfast.dequant_matmul.default
call_dequant_matmul = transforms.past_autograd(dequant_matmul_op)


@public
def dequant_matmul(
    x: torch.Tensor, qt: QuantizedTensor, bias: torch.Tensor | None = None, *, activation: str = "exact"
) -> torch.Tensor:
    """Linear layer with a quantized weight: ``x @ qt.dequantize(torch.float32).T + bias``, accumulated in float32.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        qt: quantized [N, K], on x's device.
        bias: float [N], optional.
        activation: "exact" rounds nothing; "int8" rounds x per row and weight group to int8, symmetric (max|x| / 127).

    Differentiable in x and bias, forwards and backwards; "int8" counts as the identity there (straight-through). Under
    autocast x is cast to its dtype, as for ``F.linear``.

    Returns:
        [..., N] in x's dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation; a scale that requires a gradient.
    """
    spec = qt.spec
    return call_dequant_matmul(
        x, qt.packed, qt.scale, qt.zero_point, bias, *qt.shape, spec.bits, spec.group_size, qt.layout.value, activation
    )


# linear -----------------------------------------------------------------------------------------------------------


def _check_linear(x, weight, bias, dtype):
    for name, t, dim in (("x", x, 1), ("weight", weight, 2)):
        if t.dtype not in FLOAT_DTYPES or t.dim() < dim:
            raise InvalidInputError(
                f"linear: {name} must be float32, bfloat16 or float16 with {dim} or more dimensions, got {t.dtype} {list(t.shape)}"
            )
    if weight.dim() != 2 or weight.dtype != x.dtype or x.shape[-1] != weight.shape[1]:
        raise InvalidInputError(
            f"linear: weight must be {x.dtype} [N, {x.shape[-1]}] for this x, got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOAT_DTYPES):
        raise InvalidInputError(
            f"linear: bias must be float32, bfloat16 or float16 [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}"
        )
    if dtype not in (None, *FLOAT_DTYPES):
        raise InvalidInputError(f"linear: dtype must be float32, bfloat16 or float16, got {dtype}")
    same_device("linear", x, weight, bias)


def _fake_linear(x, weight, bias, dtype):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, ScalarType? dtype) -> Tensor",
    check=_check_linear,
    fake=_fake_linear,
    reference=reference.linear,
)
linear_op = torch.ops.klfast.linear.default


@public
def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Linear layer, ``F.linear(x, weight, bias).to(dtype)`` without the intermediate, accumulated in float32.

    On a GPU it is torch's own product, and torch's settings (``torch.backends.cuda.matmul``) say how that is accumulated.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        weight: [N, K] in x's dtype, on x's device.
        bias: float [N], optional.
        dtype: of the result; x's by default. Values are rounded to x's dtype in any case, so that a wider result equals a
            narrow one widened.

    Returns:
        [..., N].

    Raises:
        InvalidInputError: a wrong dtype, shape or device.
    """
    return linear_op(x, weight, bias, dtype)


transforms.register(dequant_matmul_op, linear_op)
