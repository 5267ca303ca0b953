"""Products with a quantized or a dense weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from klfast.core.errors import InvalidInputError
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

_AT_ONCE = 1 << 24  # weights that are dequantized together; a head has a billion


def dequant_matmul(
    x: torch.Tensor, qt: QuantizedTensor, bias: torch.Tensor | None = None, activation: str = "exact"
) -> torch.Tensor:
    """Multiply x [..., K] by the dequantized [N, K], plus bias [N]: [..., N] in x's dtype, accumulated in float32.

    "int8" first rounds x per row and group of the weight: x ~ q * s with s = max|x| / 127 and q = round(x / s).
    """
    x32 = x.float()
    if activation == "int8":
        x32 = fake_quantize_rows(x32, qt.spec)
    n, k = qt.shape
    step = max(32, _AT_ONCE // max(k, 1) // 32 * 32)
    blocks = (qt.block(first, min(first + step, n)) for first in range(0, max(n, 1), step))
    y = torch.cat([x32 @ block.dequantize(torch.float32).T for block in blocks], -1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def grouped_dequant_matmul(
    x: torch.Tensor, qt: QuantizedTensor, index: torch.Tensor, count: int, activation: str = "exact"
) -> torch.Tensor:
    """Multiply rows of x [..., K] by some of ``count`` matrices [N, K], those of index [..., S]: [..., S, N]."""
    n = qt.shape[0] // count
    return by_group(
        lambda i, rows: dequant_matmul(rows, qt.block(i * n, (i + 1) * n), None, activation), x, index, count, n
    )


def by_group(
    product: Callable[[int, torch.Tensor], torch.Tensor], x: torch.Tensor, index: torch.Tensor, count: int, n: int
) -> torch.Tensor:
    """Multiply each row of x by the matrices that it is routed to; one call for each of these matrices.

    Args:
        product: multiplies rows [M, K] by a matrix, given its number: [M, N].
        x: [..., K].
        index: int64 [..., S], the numbers of the matrices that a row meets.
        count: of the matrices.
        n: N.

    Returns:
        [..., S, N], differentiable if ``product`` is.

    Raises:
        InvalidInputError: there is no matrix of such a number.
    """
    flat = index.reshape(-1)
    if flat.numel() and not (flat.min() >= 0 and flat.max() < count):
        raise out_of_range(index, count)
    order = flat.argsort(stable=True)
    rows = x.unsqueeze(0).flatten(0, -2)[order // index.shape[-1]]
    sizes = flat.bincount(minlength=count).tolist()
    found = [product(i, some) for i, some in enumerate(rows.split(sizes)) if len(some)]
    y = torch.cat(found)[order.argsort()] if found else x.new_empty(0, n)
    return y.view(*index.shape, n)


def out_of_range(index: torch.Tensor, count: int) -> InvalidInputError:
    """Return the error for the number of a matrix, or expert, that does not exist."""
    return InvalidInputError(
        f"index must lie in 0..{count - 1} for {count} matrices, got {int(index.min())}..{int(index.max())}"
    )


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Multiply x [..., K] by weight [N, K], plus bias [N], in float32; round to x's dtype, then to ``dtype``."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype).to(dtype or x.dtype)


def fake_quantize_rows(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Round float32 [..., K] to int8 per row and group, symmetric, and multiply the scale back in."""
    k = x.shape[-1]
    length = spec.group_length(k)
    groups = F.pad(x, (0, -k % length)).unflatten(-1, (-1, length)) if k else x.unsqueeze(-2)
    scale = groups.abs().amax(-1, keepdim=True) / 127 if k else groups
    inverse = torch.where(scale >= torch.finfo(torch.float32).tiny, 1 / scale, 0)  # below it, 1 / scale overflows
    return ((groups * inverse).round().clamp(-127, 127) * scale).flatten(-2)[..., :k]
