"""Products with a dense weight, by klfast or by torch: the choice that models' layers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.dispatch import registry


def dense_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Compute ``F.linear(x, weight, bias).to(dtype)``: by ``ops.linear`` if it has a kernel and needs no gradient.

    Args:
        x: float [..., K].
        weight: [N, K] in x's dtype; perhaps the stand-in of a quantized layer.
        bias: float [N], optional.
        dtype: of the result; x's by default.

    Returns:
        [..., N].

    Raises:
        RuntimeError: what ``F.linear`` refuses.
    """
    if not _torch_multiplies(x, weight, bias, dtype) and _takes(x, weight, bias):
        return ops.linear(x, weight, bias, dtype=dtype)
    y = F.linear(x, weight, bias)
    return y if dtype is None else y.to(dtype)


def _torch_multiplies(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype | None
) -> bool:
    if torch.compiler.is_compiling():  # a graph serves any number of rows: the op chooses when it runs
        return x.dtype == torch.float32
    return bool(registry.handed_over("linear", "CPU", x, weight, bias, dtype))


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return True if the op has a kernel for these tensors, and nobody needs its gradient."""
    if x.dtype not in FLOAT_DTYPES or x.dtype != weight.dtype:
        return False
    if not x.is_cpu or type(weight) not in (torch.Tensor, nn.Parameter):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    return registry.has_kernel("linear", "CPU")
