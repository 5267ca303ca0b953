"""A model's tensors by name, quantized ones as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.matrices import split_stacks
from klfast.nn import QuantEmbedding, QuantLinear
from klfast.nn.experts import QuantExperts
from klfast.quant.layouts import Layout
from klfast.quant.tensor import QuantizedTensor

Weight = torch.Tensor | QuantizedTensor


def weights(model: nn.Module) -> dict[str, Weight]:
    """Return a model's tensors under the names that they have in full precision; tied ones, one object, under each.

    A quantized stack of experts is one matrix, of all their rows; ``shapes`` tells them apart.

    Raises:
        InvalidInputError: the experts of a stack have different precisions.
    """
    if split := next(iter(split_stacks(model)), None):
        raise InvalidInputError(
            f"the experts of {split} have different precisions, but a GGUF file has one type for all; plan one for the "
            "whole stack (klfast plan --servable, or a sweep without --experts)"
        )
    modules = dict(model.named_modules())
    found: dict[str, Weight] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        holder, _, own = name.rpartition(".")
        if not isinstance(modules[holder], QuantLinear) or own == "bias":
            found[name] = tensor
    plain: dict[QuantLinear, QuantizedTensor] = {}
    for name, module in modules.items():
        if isinstance(module, (QuantLinear, QuantEmbedding)):
            layer = module.head if isinstance(module, QuantEmbedding) else module
            is_stack = isinstance(modules[name.rpartition(".")[0]], QuantExperts)
            quantized = plain.setdefault(layer, layer.quantized.to_layout(Layout.PLAIN))
            found[name if is_stack else f"{name}.weight"] = quantized
    return found


def shapes(model: nn.Module, held: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a model's ``weights`` have in full precision, [E, N, K] of a stack of experts."""
    found = {name: tuple(weight.shape) for name, weight in held.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            for stack in (f"{name}.{own}" for own in module.stack_names):
                *rows, k = found[stack]
                found[stack] = (module.num_experts, math.prod(rows) // module.num_experts, k)
    return found
