"""A model's tensors by name, quantized ones as they are."""

from __future__ import annotations

import torch
from torch import nn

from klfast.nn import QuantEmbedding, QuantLinear
from klfast.nn.experts import QuantExperts
from klfast.quant.layouts import Layout
from klfast.quant.tensor import QuantizedTensor

Weight = torch.Tensor | QuantizedTensor


def weights(model: nn.Module) -> dict[str, Weight]:
    """Return a model's tensors under the names that they have in full precision; tied ones under each."""
    modules = dict(model.named_modules())
    found: dict[str, Weight] = {}
    for name, tensor in model.state_dict().items():
        holder, _, own = name.rpartition(".")
        if not isinstance(modules[holder], QuantLinear) or own == "bias":
            found[name] = tensor
    for name, module in modules.items():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            head = module.head if isinstance(module, QuantEmbedding) else module
            is_stack = isinstance(modules[name.rpartition(".")[0]], QuantExperts)
            found[name if is_stack else f"{name}.weight"] = head.quantized.to_layout(Layout.PLAIN)
    return found


def is_same(first: Weight, second: Weight) -> bool:
    """Return True if two weights are one in memory."""
    return first is second or _place(first) == _place(second)


def _place(weight: Weight) -> int:
    return (weight.parts[0] if isinstance(weight, QuantizedTensor) else weight).data_ptr()
