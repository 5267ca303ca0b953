"""Products with a quantized or a dense weight, by the C++ extension or, where that is faster, by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from klfast import _C
from klfast.backends.cpu.buffers import empty
from klfast.backends.cpu.extension import DTYPE_CODES, address, resources
from klfast.backends.operands import FEW_ROWS, GroupedMatmulArgs, MatmulArgs
from klfast.dispatch import pins
from klfast.dispatch.arguments import Linear
from klfast.quant.layouts import Layout
from klfast.quant.tensor import QuantizedTensor, Stored, stored
from klfast.reference import out_of_range

# The formats that csrc/matmul/quantized multiplies: packed integers of this many bits.
FORMATS = ("int4", "int6", "int8")
RELAID = "the weight is in a layout for GPUs; convert it once with .to_layout."


def dequant_matmul(args: MatmulArgs) -> torch.Tensor:
    """Multiply by a quantized weight, converted first if its layout is another device's."""
    weight, parts = args.weight, args.parts
    if weight.layout is not Layout.PLAIN:
        pins.slow_path("dequant_matmul", list(args.x.shape), RELAID, how="with another pass over the weight")
        parts = args.parts_in(Layout.PLAIN)
    y = args.x.new_empty(*args.x.shape[:-1], weight.shape[0])  # torch reads single sizes in half the time of a tuple
    dequant_matmul_into(y, args.x, parts, args.bias, weight, args.activation)
    return y


def grouped_dequant_matmul(args: GroupedMatmulArgs) -> torch.Tensor:
    """Multiply each row by the matrices that it meets, after a conversion if their layout is another device's."""
    x, parts, weight = args.x, args.parts, args.weight
    if weight.layout is not Layout.PLAIN:
        pins.slow_path("grouped_dequant_matmul", list(x.shape), RELAID, how="with another pass over the weight")
        parts = list(args.quantized.to_layout(Layout.PLAIN).parts)
    rows, stride = _rows(x, weight.shape[1])
    parts, index, each = _contiguous(parts), args.index.contiguous(), args.index.shape[-1]
    y = x.new_empty((*index.shape, args.n))
    m = index.numel() // max(each, 1)
    product = _arguments(rows, stride, parts, None, y, m, args.n, weight, args.activation)
    if not _C.grouped_dequant_matmul(address(index), each, args.matrices, *product):
        raise out_of_range(index, args.matrices)
    return y


def why_torch_multiplies(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """Return why ``linear`` uses torch's product and a cast; empty if klfast's kernel is faster (docs/KERNEL_NOTES.md).

    torch is faster in float32, and for many rows of types that the CPU multiplies natively: 16-bit types with AMX,
    bfloat16 with AVX-512-BF16 unless the result is wider. Without such instructions torch is several times slower, and
    also for few rows of 16-bit types.
    """
    if pins.pinned() in pins.CPU_TIERS:
        return ""
    if x.dtype == torch.float32:
        return "torch's own product is faster in float32."
    if x.numel() <= FEW_ROWS * x.shape[-1:].numel():
        return ""
    if bias is not None and bias.dtype != x.dtype:
        return ""  # torch would round it first
    if not pins.why_not("amx"):
        return "torch's own product is faster for many rows where the CPU has AMX."
    if x.dtype == torch.bfloat16 == (dtype or x.dtype) and not pins.why_not("avx512bf16"):
        return "torch's own product is faster for many rows of bfloat16 where the CPU has AVX-512-BF16."
    return ""


def linear(a: Linear) -> torch.Tensor:
    """Multiply by torch where that is faster, else by the extension."""
    x, weight, bias, dtype = a
    n = weight.shape[0]
    dtype = dtype or x.dtype
    if why_torch_multiplies(x, weight, bias, dtype):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)
    y = empty(*x.shape[:-1], n, dtype=dtype)
    linear_into(y, x, weight, bias, rounded_to=x.dtype)
    return y


def dequant_matmul_into(
    y: torch.Tensor,
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    weight: Stored,
    activation: str = "exact",
) -> None:
    """Write x [..., K] times the plain parts of packed integers to contiguous y [..., N], in x's dtype or wider."""
    n, k = weight.shape
    rows, stride = _rows(x, k)
    parts, bias = _contiguous(parts), None if bias is None else bias.contiguous()  # they must outlive the call
    _C.dequant_matmul(*_arguments(rows, stride, parts, bias, y, y.numel() // max(n, 1), n, weight, activation))


def difference_matmul(
    x: torch.Tensor, known_x: torch.Tensor, known_y: torch.Tensor, weight: QuantizedTensor
) -> torch.Tensor:
    """Return ``known_y + dequant_matmul(x - known_x, weight, activation="int8")``, without the intermediates.

    Args:
        x: float32 [C * R, ..., K].
        known_x: float32 [R, ..., K], contiguous, which meets each of x's C parts.
        known_y: float32 [R, ..., N], contiguous.
        weight: packed integers [N, K], in the plain layout.

    Returns:
        float32 [C * R, ..., N].
    """
    n, k = weight.shape
    rows, stride = _rows(x, k)
    y = x.new_empty(*x.shape[:-1], n)
    meaning = stored(n, k, weight.spec.text, weight.layout.value)
    product = _arguments(rows, stride, weight.parts, known_y, y, y.numel() // n, n, meaning, "int8")
    _C.difference_matmul(address(known_x), known_x.numel() // k, *product)
    return y


def _contiguous(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [part.contiguous() for part in parts]


def _arguments(
    x: torch.Tensor,
    x_stride: int,
    parts: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    m: int,
    n: int,
    weight: Stored,
    activation: str,
) -> tuple[object, ...]:
    """Describe a product with plain parts to the extension: m rows of x, n rows of a matrix."""
    packed, scale, *zero_points = parts
    return (
        address(x),
        DTYPE_CODES[x.dtype],
        x_stride,
        address(packed),
        address(scale),
        DTYPE_CODES[scale.dtype],
        address(zero_points[0] if zero_points else None),
        address(bias),
        DTYPE_CODES[x.dtype if bias is None else bias.dtype],
        address(y),
        DTYPE_CODES[y.dtype],
        m,
        n,
        weight.shape[1],
        weight.spec.bits,
        weight.group_length,
        activation == "int8",
        *resources(),
    )


def linear_into(
    y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, rounded_to: torch.dtype
) -> None:
    """Write x [..., K] times weight [N, K] to contiguous y [..., N], rounded to a dtype no wider than y's."""
    n, k = weight.shape
    rows, stride = _rows(x, k)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    _C.linear(
        address(rows),
        DTYPE_CODES[x.dtype],
        stride,
        address(weight),
        DTYPE_CODES[weight.dtype],
        weight.stride(0),
        address(bias),
        DTYPE_CODES[x.dtype if bias is None else bias.dtype],
        address(y),
        DTYPE_CODES[y.dtype],
        DTYPE_CODES[rounded_to],
        y.numel() // max(n, 1),
        n,
        k,
        *resources(),
    )


def _rows(x: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
    """Return x [..., K] with its last dimension contiguous, and its row stride; quick if x is contiguous."""
    if x.is_contiguous():
        return x, k
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
