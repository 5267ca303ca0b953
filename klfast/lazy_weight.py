"""LazyWeight: the ``.weight`` of a quantized layer, which costs nothing until somebody computes with it."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map_only

from klfast import ops
from klfast.errors import InvalidInputError
from klfast.types import QuantizedTensor

_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
# What a wrapper without storage answers by itself; every other function sees the dequantized matrix.
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "grad")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size, torch.Tensor.is_floating_point,
}


class LazyWeight(torch.Tensor):
    """An [N, K] tensor that stands for ``quantized`` rounded to ``dtype``.

    Code written for nn.Linear reads ``layer.weight``: often only its dtype (the causal language models of
    transformers do at every call), sometimes as an operand (``dt_proj.weight @ x`` in the Mamba mixers). Metadata is
    answered without dequantizing, a product with this matrix on the left and ``F.linear`` run klfast's
    dequant_matmul, and any other operation sees a dequantized copy (so writing to it changes no layer).
    """

    quantized: QuantizedTensor

    @staticmethod
    def __new__(cls, quantized: QuantizedTensor, dtype: torch.dtype) -> LazyWeight:
        return torch.Tensor._make_wrapper_subclass(cls, quantized.shape, dtype=dtype, device=quantized.device)

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        self.quantized = quantized

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.data_ptr:  # a matrix made for the call would be gone when the pointer is used
            raise InvalidInputError("the weight of a quantized layer has no memory of its own; use layer.quantized.dequantize()")
        if func in _MATMULS and not kwargs and _multiplies(args[0], args[1]):
            weight, x = args
            return ops.dequant_matmul(x.transpose(-1, -2), weight.quantized).transpose(-1, -2)
        if func is torch.nn.functional.linear and isinstance(args[1], LazyWeight) and args[0].dtype == args[1].dtype:
            return ops.dequant_matmul(args[0], args[1].quantized, *args[2:], **kwargs)
        return func(*_dense(args), **_dense(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*_dense(args), **_dense(kwargs or {}))


def _multiplies(weight: object, x: object) -> bool:
    return (
        isinstance(weight, LazyWeight) and isinstance(x, torch.Tensor) and not isinstance(x, LazyWeight)
        and x.dim() >= 2 and x.shape[-2] == weight.shape[1] and x.dtype == weight.dtype
    )


def _dense(tree):
    return tree_map_only(LazyWeight, lambda weight: weight.quantized.dequantize(torch.float32).to(weight.dtype), tree)
