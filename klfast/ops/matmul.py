"""Products with a quantized or a dense weight: dequant_matmul and linear."""

from __future__ import annotations

from operator import attrgetter

import torch

from klfast import reference
from klfast.backends.operands import GroupedMatmulArgs, MatmulArgs
from klfast.core.arguments import ACTIVATIONS, check_activation
from klfast.core.device_graphs import declare_host_reads
from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import Linear, schema
from klfast.dispatch.checks import public, same_device
from klfast.dispatch.registry import define
from klfast.ops import transforms
from klfast.quant.tensor import QuantizedTensor

# dequant_matmul ---------------------------------------------------------------------------------------------------


def _check_dequant_matmul(args: MatmulArgs) -> None:
    x, parts, bias, weight, activation = args
    n, k = weight.shape
    if x.dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"dequant_matmul: x must be {FLOAT_NAMES}, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise InvalidInputError(f"dequant_matmul: x must be [..., {k}] for a [{n}, {k}] weight, got {list(x.shape)}")
    if bias is not None and (bias.shape != (n,) or bias.dtype not in FLOAT_DTYPES):
        raise InvalidInputError(
            f"dequant_matmul: bias must be {FLOAT_NAMES} [{n}], got {bias.dtype} {list(bias.shape)}"
        )
    if activation not in ACTIVATIONS:
        check_activation("dequant_matmul: ", activation)
    weight.check(parts)
    same_device("dequant_matmul", x, *parts, bias)


def _fake_dequant_matmul(args: MatmulArgs) -> torch.Tensor:
    return args.x.new_empty((*args.x.shape[:-1], args.weight.shape[0]))


def _reference_dequant_matmul(args: MatmulArgs) -> torch.Tensor:
    return reference.dequant_matmul(args.x, args.quantized, args.bias, args.activation)


dequant_matmul_op = define(
    "dequant_matmul(Tensor x, Tensor[] parts, Tensor? bias, int n, int k, str format, str layout, str activation) "
    "-> Tensor",
    check=_check_dequant_matmul,
    fake=_fake_dequant_matmul,
    reference=_reference_dequant_matmul,
    arguments=MatmulArgs.of,
    formats=attrgetter("weight.formats"),
)
call_dequant_matmul = transforms.past_autograd(dequant_matmul_op)


@public
def dequant_matmul(
    x: torch.Tensor, qt: QuantizedTensor, bias: torch.Tensor | None = None, *, activation: str = "exact"
) -> torch.Tensor:
    """Multiply by a quantized weight: ``x @ qt.dequantize(torch.float32).T + bias``, accumulated in float32.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        qt: quantized [N, K], on x's device.
        bias: float [N], optional.
        activation: "exact" does not round; "int8" rounds x per row and weight group to int8, symmetric (max|x| / 127).

    Differentiable in x and bias, in forward and reverse mode; "int8" counts as the identity there (straight-through).
    Under autocast x is cast to its dtype, as for ``F.linear``.

    Returns:
        [..., N] in x's dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape, device or activation; a scale that requires a gradient.
    """
    if qt.spec.corrected:
        base, rows, correction = qt.halves
        y = dequant_matmul(x, base, bias, activation=activation)
        return y.index_add(-1, rows, dequant_matmul(x, correction, activation=activation))
    return call_dequant_matmul(x, list(qt.parts), bias, *qt.shape, qt.spec.text, qt.layout.value, activation)


# grouped_dequant_matmul -------------------------------------------------------------------------------------------


def _check_grouped_dequant_matmul(args: GroupedMatmulArgs) -> None:
    x, index, (rows, k) = args.x, args.index, args.weight.shape
    if x.dtype not in FLOAT_DTYPES or x.dim() == 0 or x.shape[-1] != k:
        raise InvalidInputError(
            f"grouped_dequant_matmul: x must be {FLOAT_NAMES} [..., {k}] for [N, {k}] matrices, "
            f"got {x.dtype} {list(x.shape)}"
        )
    if index.dtype != torch.int64 or index.shape[:-1] != x.shape[:-1] or index.dim() != x.dim():
        raise InvalidInputError(
            f"grouped_dequant_matmul: index must be torch.int64 {[*x.shape[:-1], 'S']} for this x, "
            f"got {index.dtype} {list(index.shape)}"
        )
    if args.matrices < 1 or rows % args.matrices:
        raise InvalidInputError(f"grouped_dequant_matmul: {rows} rows cannot be those of {args.matrices} matrices")
    if args.activation not in ACTIVATIONS:
        check_activation("grouped_dequant_matmul: ", args.activation)
    args.weight.check(args.parts)
    same_device("grouped_dequant_matmul", x, index, *args.parts)


grouped_dequant_matmul_op = define(
    "grouped_dequant_matmul(Tensor x, Tensor[] parts, Tensor index, int count, int n, int k, str format, str layout, "
    "str activation) -> Tensor",
    check=_check_grouped_dequant_matmul,
    fake=lambda args: args.x.new_empty((*args.index.shape, args.n)),
    reference=lambda args: reference.grouped_dequant_matmul(
        args.x, args.quantized, args.index, args.matrices, args.activation
    ),
    arguments=GroupedMatmulArgs.of,
    formats=attrgetter("weight.formats"),
)
declare_host_reads(grouped_dequant_matmul_op)  # how many rows go to each matrix


@public
def grouped_dequant_matmul(
    x: torch.Tensor, qt: QuantizedTensor, index: torch.Tensor, count: int, *, activation: str = "exact"
) -> torch.Tensor:
    """Multiply each row of x by a few of many quantized matrices; the others are not read (mixtures of experts).

    ``y[..., s, :] = dequant_matmul(x, matrix[index[..., s]])``. Not differentiable.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        qt: quantized [count * N, K], the matrices one below the other, on x's device.
        index: int64 [..., S], from 0 to count - 1: the matrices that each row of x meets.
        count: the number of matrices.
        activation: as in ``dequant_matmul``.

    Returns:
        [..., S, N] in x's dtype.

    Raises:
        InvalidInputError: a wrong dtype, shape, device, index or activation.
    """
    return grouped_dequant_matmul_op(
        x, list(qt.parts), index, count, *qt.shape, qt.spec.text, qt.layout.value, activation
    )


# linear -----------------------------------------------------------------------------------------------------------


def _check_linear(a: Linear) -> None:
    x, weight, bias, dtype = a
    for name, t, dim in (("x", x, 1), ("weight", weight, 2)):
        if t.dtype not in FLOAT_DTYPES or t.dim() < dim:
            raise InvalidInputError(
                f"linear: {name} must be {FLOAT_NAMES} with {dim} or more dimensions, got {t.dtype} {list(t.shape)}"
            )
    if weight.dim() != 2 or weight.dtype != x.dtype or x.shape[-1] != weight.shape[1]:
        raise InvalidInputError(
            f"linear: weight must be {x.dtype} [N, {x.shape[-1]}] for this x, got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOAT_DTYPES):
        raise InvalidInputError(
            f"linear: bias must be {FLOAT_NAMES} [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}"
        )
    if dtype not in (None, *FLOAT_DTYPES):
        raise InvalidInputError(f"linear: dtype must be {FLOAT_NAMES}, got {dtype}")
    same_device("linear", x, weight, bias)


def _fake_linear(a: Linear) -> torch.Tensor:
    return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=a.dtype)


linear_op = define(
    schema("linear", Linear, "Tensor"),
    arguments=Linear,
    check=_check_linear,
    fake=_fake_linear,
    reference=lambda a: reference.linear(*a),
)


@public
def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Compute ``F.linear(x, weight, bias).to(dtype)`` without the intermediate, accumulated in float32.

    On a GPU this is torch's own product, accumulated as torch's settings (``torch.backends.cuda.matmul``) say.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        weight: [N, K] in x's dtype, on x's device.
        bias: float [N], optional.
        dtype: of the result; x's by default. Values are always rounded to x's dtype, so that a wider result equals a
            narrow one cast to it.

    Returns:
        [..., N].

    Raises:
        InvalidInputError: a wrong dtype, shape or device.
    """
    return linear_op(x, weight, bias, dtype)


differentiable_dequant_matmul = transforms.register(dequant_matmul_op, linear_op)
