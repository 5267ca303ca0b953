"""GPT-2's Conv1D (transformers.pytorch_utils), a linear layer whose weight is stored as [in, out]."""

from __future__ import annotations

from typing import Any

from torch import nn

from klfast.nn.linear import QuantLinear


class QuantConv1D(QuantLinear):
    """A QuantLinear in the place of a Conv1D; like its packed tensors, its ``.weight`` is [out, in].

    It is a class of its own since other readers of saved folders pack and unpack nn.Linear alone.
    """


def is_conv1d(module: nn.Module) -> bool:
    """Return True for a Conv1D."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def as_linear(module: Any) -> nn.Linear:
    """Return an nn.Linear as it is, and for a Conv1D one that computes the same: its weight is a view, its bias shared.

    A new weight given to the view's parameter does not reach the Conv1D.
    """
    if isinstance(module, nn.Linear):
        return module
    view = nn.Linear(module.nx, module.nf, device="meta").train(module.training)
    view.weight = nn.Parameter(module.weight.detach().T, requires_grad=module.weight.requires_grad)
    view.bias = module.bias
    return view


def quantized_class(module: nn.Module) -> type[QuantLinear]:
    """Return the class that replaces this nn.Linear or Conv1D."""
    return QuantConv1D if is_conv1d(module) else QuantLinear
