"""Products with a quantized weight, in Triton; torch multiplies by dense ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from klfast import reference
from klfast.backends.operands import GroupedMatmulArgs, MatmulArgs
from klfast.dispatch import pins
from klfast.dispatch.arguments import Linear
from klfast.quant.layouts import RELAID, Layout, fill_blocks
from klfast.quant.spec import QuantSpec


def dequant_matmul(args: MatmulArgs) -> torch.Tensor:
    """Multiply by a quantized weight, converted first if it is not tiled."""
    x, parts, bias, weight, activation = args
    n, k = weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    if not k or not y.numel():
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if weight.layout is not Layout.TILED:
        pins.slow_path("dequant_matmul", list(x.shape), RELAID, how="with another pass over the weight")
        parts = args.parts_in(Layout.TILED)
    dequant_product(x.reshape(-1, k), parts, bias, y.view(-1, n), k, weight.spec, int8=activation == "int8")
    return y


def grouped_dequant_matmul(args: GroupedMatmulArgs) -> torch.Tensor:
    """Multiply by one matrix after the other, each sliced out of the tiles of all, which copies it."""
    x, n, weight, qt = args.x, args.n, args.weight, args.quantized
    k = weight.shape[1]
    if not k or not n:
        return x.new_zeros((*args.index.shape, n))
    if weight.layout is not Layout.TILED:
        pins.slow_path("grouped_dequant_matmul", list(x.shape), RELAID, how="with another pass over the weight")
        qt = qt.to_layout(Layout.TILED)

    def product(i: int, rows: torch.Tensor) -> torch.Tensor:
        y = rows.new_empty(len(rows), n)
        parts = qt.block(i * n, (i + 1) * n).parts
        dequant_product(rows, parts, None, y, k, weight.spec, int8=args.activation == "int8")
        return y

    return reference.by_group(product, x, args.index, args.matrices, n)


def dequant_product(
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    k: int,
    spec: QuantSpec,
    *,
    int8: bool = False,
) -> None:
    """Write x [M, K] times a weight's parts in ``Layout.TILED`` to y [M, N], of any float dtype; neither is empty."""
    from klfast.kernels import dequant_matmul as kernel
    from klfast.kernels.launch import cores, family, shared_memory

    rows = fill_blocks(x, spec.bits, spec.group_size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    weight = kernel.Weight(*(part.detach().contiguous() for part in parts), k=k, spec=spec)
    bias = None if bias is None else bias.detach().contiguous()
    device = dict(family=family(x.device), cores=cores(x.device), shared=shared_memory(x.device))
    for launch in kernel.plan(rows, weight, bias, y, int8=int8, **device):
        launch.run()


def linear(a: Linear) -> torch.Tensor:
    """Multiply by torch (cuBLAS, oneDNN), which klfast could not beat."""
    x, weight, bias, dtype = a
    if bias is None or bias.dtype == x.dtype:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return y.detach().to(dtype or x.dtype)  # no gradients, like all ops
