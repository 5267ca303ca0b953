"""Sizes of a model's parts, and how much of it cannot be quantized."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from klfast.models.matrices import Matrix, is_linear, matrices
from klfast.nn.split_stack import SplitStack
from klfast.quant.spec import SHAPE_BYTES


def weight_bytes(of: Matrix) -> int:
    """Return a matrix's bytes as saved: those of its floats, or of packed values, scales, zeros and shape."""
    shapes = len(of.holder.roundings) if isinstance(of.holder, SplitStack) else int(of.is_quantized)
    return of.nbytes + SHAPE_BYTES * shapes


def other_bytes(model: nn.Module) -> int:
    """Return the bytes of everything in a saved model except its matrices.

    Shared tensors count once. An embedding tied to the head does not count: it is counted with the head.
    """
    weights = {
        id(tensor)
        for one in matrices(model).values()
        for name, tensor in _own_tensors(one.holder)
        if name.startswith(one.attribute) or isinstance(one.holder, SplitStack)
    }
    state = {
        id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)
    }
    return sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key not in weights)


def total_bytes(model: nn.Module) -> int:
    """Return the bytes of a model as saved."""
    return sum(map(weight_bytes, matrices(model).values())) + other_bytes(model)


def unquantizable(model: nn.Module) -> dict[str, int]:
    """Return the bytes of the weight matrices that klfast cannot quantize, by the class that holds them.

    These are routers, experts that compute otherwise than ``QuantExperts``, and linear layers of other classes.
    Embeddings and convolutions are not matrices to multiply by, and are left out.
    """
    found: dict[str, int] = {}
    seen = {id(one.tensor) for one in matrices(model).values() if not one.is_quantized}
    for module in model.modules():
        if is_linear(module) or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd, SplitStack)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            stacked = parameter.dim() > 2 and min(parameter.shape[-2:]) > 1
            is_matrix = stacked or (parameter.dim() == 2 and name == "weight")
            if is_matrix and id(parameter) not in seen:
                seen.add(id(parameter))
                found[type(module).__name__] = (
                    found.get(type(module).__name__, 0) + parameter.numel() * parameter.element_size()
                )
    return found


def warn_unquantizable(model: nn.Module, what: str) -> None:
    """Warn, in one line, how much of a model ``what`` leaves in full precision, if it is at least a hundredth."""
    kinds = unquantizable(model)
    whole = sum(map(weight_bytes, matrices(model).values())) + other_bytes(model)
    if sum(kinds.values()) < 0.01 * whole:
        return
    listed = ", ".join(
        f"{kind} ({size / 1e6:.1f} MB)" for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
    )
    warnings.warn(
        f"{what}: {sum(kinds.values()) / whole:.0%} of the bytes of {type(model).__name__} cannot be quantized and "
        f"stay as they are: the weights of {listed}; klfast quantizes nn.Linear and most experts",
        stacklevel=3,
    )


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    inside = isinstance(module, SplitStack)
    return [*module.named_parameters(recurse=inside), *module.named_buffers(recurse=inside)]
