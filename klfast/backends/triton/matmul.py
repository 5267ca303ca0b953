"""Products with a quantized weight, in Triton; those with a dense one are torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.dispatch import pins
from klfast.quant.layouts import RELAID, fill_blocks, parts_in
from klfast.quant.types import Layout


def dequant_matmul(x, packed, scale, zero_point, bias, n, k, bits, group_size, layout, activation):
    y = x.new_empty((*x.shape[:-1], n))
    if not k or not y.numel():
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if layout != Layout.TILED.value:
        pins.slow_path("dequant_matmul", list(x.shape), RELAID, how="with another pass over the weight")
        packed, scale, zero_point = parts_in(Layout.TILED, packed, scale, zero_point, n, k, bits, group_size, layout)
    dequant_product(
        x.reshape(-1, k), packed, scale, zero_point, bias, y.view(-1, n), k, bits, group_size, int8=activation == "int8"
    )
    return y


def dequant_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    k: int,
    bits: int,
    group_size: int,
    *,
    int8: bool = False,
) -> None:
    """Write x [M, K] times a weight's parts in ``Layout.TILED`` to y [M, N], of any float dtype; neither is empty."""
    from klfast.kernels import dequant_matmul as kernel
    from klfast.kernels.launch import cores, family

    rows = fill_blocks(x, bits, group_size)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    contiguous = [None if t is None else t.detach().contiguous() for t in (packed, scale, zero_point, bias)]
    for launch in kernel.plan(
        rows, *contiguous, y, k, bits, group_size, int8=int8, family=family(x.device), cores=cores(x.device)
    ):
        launch.run()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor:
    """torch's own product (cuBLAS, oneDNN): no kernel of klfast's would be better."""
    if bias is None or bias.dtype == x.dtype:
        y = F.linear(x, weight, bias)
    else:
        y = F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    return y.detach().to(dtype or x.dtype)  # no gradients, as all ops
