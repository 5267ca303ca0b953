"""The linear layers of a causal language model: which can be quantized, and what identifies a model."""

from __future__ import annotations

import difflib
import warnings

import torch
from torch import nn

from klfast.core.errors import InvalidInputError, UnknownLayerError
from klfast.quant.spec import SHAPE_BYTES


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by module name, in module order, lm_head included.

    A layer counts as linear if it is an ``nn.Linear`` or klfast's ``QuantLinear``; convolutions, embeddings and norms
    are never quantized, nor are the matrices that ``unquantizable`` lists. Layers that share a weight count once, under
    the first of their names (see ``sharers``).
    """
    return {names[0]: model.get_submodule(names[0]) for names in sharers(model)}


def sharers(model: nn.Module) -> list[list[str]]:
    """The names of the linear layers, in module order; those of layers that are, or share a weight with, one another together."""
    from klfast.nn import QuantLinear

    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, QuantLinear)):
            weight = (
                module._buffers.get(module.part_names[0])
                if isinstance(module, QuantLinear)
                else module._parameters.get("weight")
            )
            groups.setdefault(id(module if weight is None else weight), []).append(name)
    return list(groups.values())


def linear(model: nn.Module, name: str) -> nn.Module:
    """The linear layer of that name.

    Raises:
        UnknownLayerError: there is none; the message names the closest.
    """
    found = [known for names in sharers(model) for known in names]
    if name not in found:
        close = difflib.get_close_matches(name, found, 1)
        raise UnknownLayerError(
            f"the model has no linear layer {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return model.get_submodule(name)


def row_parts(model: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """The uses that the rows of a linear layer are split between, by name, as (first, end); empty if there is but one.

    A module that holds such a layer has ``row_parts``: {the layer's name within it: {use: (first, end)}}.
    """
    parent, _, leaf = name.rpartition(".")
    return dict(getattr(model.get_submodule(parent), "row_parts", {}).get(leaf, {}))


def head_name(model: nn.Module) -> str:
    """Module name of the output projection (lm_head)."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return name
    raise InvalidInputError(f"{type(model).__name__} has no output embeddings; klfast needs a causal language model")


def is_head_tied(model: nn.Module) -> bool:
    """Whether the head and the input embedding share one weight."""
    from klfast.nn import QuantEmbedding

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(embedding, QuantEmbedding):
        return embedding.head is head
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def weight_bytes(layer: nn.Module) -> int:
    """Bytes of a linear layer's weight as saved: its float matrix, or packed values, scales, zero points and shape."""
    quantized = getattr(layer, "quantized", None)
    return layer.weight.numel() * layer.weight.element_size() if quantized is None else quantized.nbytes + SHAPE_BYTES


def other_bytes(model: nn.Module) -> int:
    """Bytes of everything that a saved model holds beside the weights of its linear layers.

    Shared tensors count once, and an embedding tied to the head not at all: it is counted with the head.
    """
    weights = {
        id(tensor)
        for layer in linears(model).values()
        for name, tensor in _own_tensors(layer)
        if name.startswith("weight")
    }
    state = {
        id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)
    }
    return sum(tensor.numel() * tensor.element_size() for key, tensor in state.items() if key not in weights)


def unquantizable(model: nn.Module) -> dict[str, int]:
    """Bytes of the weight matrices that klfast cannot quantize since they belong to no ``nn.Linear``, by the class that holds them.

    These are mixtures of experts, whose weights lie in one tensor of three dimensions, and linear layers of other classes
    (GPT-2's Conv1D). Embeddings and convolutions are not matrices to multiply by, and are left out.
    """
    from klfast.nn import QuantLinear

    found: dict[str, int] = {}
    seen = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, QuantLinear, nn.Embedding, nn.modules.conv._ConvNd)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            stacked = parameter.dim() > 2 and min(parameter.shape[-2:]) > 1
            if (stacked or (parameter.dim() == 2 and name == "weight")) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[type(module).__name__] = (
                    found.get(type(module).__name__, 0) + parameter.numel() * parameter.element_size()
                )
    return found


def warn_unquantizable(model: nn.Module, what: str) -> None:
    """Say in one line how much of a model ``what`` leaves in full precision, unless it is less than a hundredth."""
    kinds = unquantizable(model)
    whole = sum(weight_bytes(layer) for layer in linears(model).values()) + other_bytes(model)
    if sum(kinds.values()) < 0.01 * whole:
        return
    listed = ", ".join(
        f"{kind} ({size / 1e6:.1f} MB)" for kind, size in sorted(kinds.items(), key=lambda item: -item[1])
    )
    warnings.warn(
        f"{what}: {sum(kinds.values()) / whole:.0%} of the bytes of {type(model).__name__} cannot be quantized and stay as they are: "
        f"the weights of {listed}; klfast quantizes nn.Linear",
        stacklevel=3,
    )


def refuse_moving_weights(model: nn.Module) -> None:
    """Raise InvalidInputError for a model whose forward changes its weights in place, as RWKV's does with rescale_every."""
    if (every := getattr(getattr(model, "config", None), "rescale_every", 0)) and every > 0:
        raise InvalidInputError(
            f"{type(model).__name__} divides weights in place when it runs (rescale_every={every}), so they cannot be quantized; load it "
            "with from_pretrained(..., rescale_every=0), which computes the same"
        )


def _own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
