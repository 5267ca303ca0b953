"""LazyWeight: the ``.weight`` of a quantized layer, dequantized only when something computes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_any, tree_map_only

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.quant.tensor import QuantizedTensor

READ_ONLY = (
    "the weight of a quantized layer is read-only; "
    "change the full-precision weight and quantize it again (klfast.quantize)"
)
_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
# Functions that a wrapper without storage supports itself; every other one sees the dequantized matrix.
_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_meta", "grad")
    ),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
}
_DATA: Any = torch.Tensor.data
_ITSELF = (_DATA.__get__, torch.Tensor.detach, torch.Tensor.detach_)
_ARRAYS = (torch.Tensor.numpy, torch.Tensor.__array__)


class LazyWeight(torch.Tensor):
    """An [N, K] tensor that represents ``quantized`` rounded to ``dtype``.

    Code written for nn.Linear reads ``layer.weight``: often only its dtype (transformers' causal language models do at
    every call), sometimes as an operand (``dt_proj.weight @ x`` in the Mamba mixers). Metadata is available without
    dequantizing, a product with this matrix on the left and ``F.linear`` run klfast's dequant_matmul, and any other
    operation sees a dequantized copy. Writing to it, or to a view of it, raises InvalidInputError.
    """

    quantized: QuantizedTensor
    _is_hf_initialized = True  # transformers' initialisers leave it alone

    @staticmethod
    def __new__(cls, quantized: QuantizedTensor, dtype: torch.dtype) -> LazyWeight:
        """Create a tensor without storage."""
        return torch.Tensor._make_wrapper_subclass(cls, quantized.shape, dtype=dtype, device=quantized.device)

    def __init__(self, quantized: QuantizedTensor, dtype: torch.dtype) -> None:
        self.quantized = quantized

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ITSELF:
            return args[0]
        if func is torch.Tensor.data_ptr:  # a copy made for the call would be gone when the pointer is used
            raise InvalidInputError(
                "the weight of a quantized layer has no memory of its own; use layer.quantized.dequantize()"
            )
        if func in _MATMULS and not kwargs and _multiplies(args[0], args[1]):
            weight, x = args
            return ops.dequant_matmul(x.transpose(-1, -2), weight.quantized).transpose(-1, -2)
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear(*args, **kwargs)
            if isinstance(weight, LazyWeight) and not isinstance(x, LazyWeight) and _fit(x, weight):
                return ops.dequant_matmul(x, weight.quantized, bias)
        return _on_copies(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the C function that disables it
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        written = [value for value, argument in zip(args, func._schema.arguments, strict=False) if argument.is_write]
        if tree_any(lambda leaf: isinstance(leaf, LazyWeight), (written, (kwargs or {}).get("out"))):
            raise InvalidInputError(f"{func}: {READ_ONLY}")
        return func(*_dense(args), **_dense(kwargs or {}))


class TiedWeight(LazyWeight):
    """The ``.weight`` of an embedding tied to a quantized head.

    torch treats it as a parameter, so transformers' tie_weights accepts it.
    """

    _is_param = True


class _View(torch.Tensor):
    """A view of a dequantized copy. Writing to it raises, too, since the values would be lost."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _on_copies(func, args, kwargs or {})


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _fit(x: torch.Tensor, weight: LazyWeight) -> bool:
    return x.dtype == weight.dtype and x.dtype in FLOAT_DTYPES


def _multiplies(weight: object, x: object) -> bool:
    return (
        isinstance(weight, LazyWeight)
        and isinstance(x, torch.Tensor)
        and not isinstance(x, LazyWeight)
        and x.dim() >= 2
        and x.shape[-2] == weight.shape[1]
        and _fit(x, weight)
    )


def _on_copies(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Call ``func`` on dequantized copies; raise InvalidInputError if it writes to them.

    Results that share the copies' memory are views of the weight, and are read-only, too.
    """
    _refuse_attribute(func, args)
    copies: list[torch.Tensor] = []

    def copy(weight: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False):  # inference tensors have no version
            copies.append(_dense(weight) if isinstance(weight, LazyWeight) else weight.as_subclass(torch.Tensor))
        return copies[-1]

    args, kwargs = tree_map_only((LazyWeight, _View), copy, (args, kwargs))
    versions = [one._version for one in copies]
    result = func(*args, **kwargs)
    if versions != [one._version for one in copies]:
        raise InvalidInputError(f"{func.__name__}: {READ_ONLY}")
    if func in _ARRAYS and copies:
        result.setflags(write=False)
    memory = {_memory(one) for one in copies}

    def guarded(t: torch.Tensor) -> torch.Tensor:
        return t.as_subclass(_View) if type(t) is torch.Tensor and _memory(t) in memory else t

    return tree_map_only(torch.Tensor, guarded, result)


def _refuse_attribute(func: Any, args: tuple[Any, ...]) -> None:
    """Raise if ``func`` sets an attribute (.data, .grad, .requires_grad) to anything except None or False."""
    if func is torch.Tensor.requires_grad_ and args[1:] != (False,):
        raise InvalidInputError(f"requires_grad_: {READ_ONLY}")
    if getattr(func, "__name__", "") == "__set__" and args[1] is not None and args[1] is not False:
        raise InvalidInputError(f"{func.__self__.__name__}: {READ_ONLY}")


def _memory(t: torch.Tensor) -> int | None:
    """Return the address of a tensor's memory; None if it has none of its own, as inside torch.func."""
    try:
        return t.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _dense(tree: Any) -> Any:
    return tree_map_only(LazyWeight, lambda weight: weight.quantized.dequantize(torch.float32).to(weight.dtype), tree)


class ReadOnlyWeight(nn.Module):
    """A module whose ``weight`` represents a quantized one and cannot be replaced."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
            return
        own: Any = self.weight
        if not isinstance(value, TiedWeight) or value.quantized.parts[0] is not own.quantized.parts[0]:
            raise InvalidInputError(f"weight: {READ_ONLY}")
