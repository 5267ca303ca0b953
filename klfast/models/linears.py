"""The linear layers of a causal language model: those that can be quantized, and the row ranges of fused ones."""

from __future__ import annotations

import difflib

from torch import nn

from klfast.core.errors import InvalidInputError, UnknownLayerError
from klfast.models.families import rows_of
from klfast.nn import QuantLinear
from klfast.nn.conv1d import as_linear, is_conv1d


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer by module name, in module order, including lm_head.

    A layer counts as linear if it is an ``nn.Linear``, as klfast's ``QuantLinear`` is, or a Conv1D, which is seen
    through ``klfast.nn.conv1d.as_linear``; convolutions, embeddings and norms are never quantized, nor are the matrices
    that ``klfast.models.sizes.unquantizable`` lists. Layers that share a weight count once, under the first of their
    names (see ``sharers``).
    """
    return {names[0]: as_linear(model.get_submodule(names[0])) for names in sharers(model)}


def sharers(model: nn.Module) -> list[list[str]]:
    """Return the names of the linear layers, in module order, grouped by weight."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module):
            weight = (
                module._buffers.get(module.part_names[0])
                if isinstance(module, QuantLinear)
                else module._parameters.get("weight")
            )
            groups.setdefault(id(module if weight is None else weight), []).append(name)
    return list(groups.values())


def linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of that name.

    Raises:
        UnknownLayerError: there is none; the message names the closest.
    """
    found = [known for names in sharers(model) for known in names]
    if name not in found:
        close = difflib.get_close_matches(name, found, 1)
        raise UnknownLayerError(
            f"the model has no linear layer {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return as_linear(model.get_submodule(name))


def linear_names(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers under each of their names: a layer that several blocks share has several."""
    return {
        name: as_linear(module) for name, module in model.named_modules(remove_duplicate=False) if is_linear(module)
    }


def is_linear(module: nn.Module) -> bool:
    """Return True for an nn.Linear and for a Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def row_parts(model: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """Return the row ranges of a fused linear layer by use, {use: (first, end)}; empty if the layer is not fused.

    They come from the record of the model's family (klfast.models.families) for the module that contains the layer.
    """
    parent, _, leaf = name.rpartition(".")
    return dict(rows_of(model.get_submodule(parent)).get(leaf, {}))


def refuse_moving_weights(model: nn.Module) -> None:
    """Raise InvalidInputError if the forward changes weights in place, as RWKV's does with rescale_every."""
    if (every := getattr(getattr(model, "config", None), "rescale_every", 0)) and every > 0:
        raise InvalidInputError(
            f"{type(model).__name__} divides weights in place when it runs (rescale_every={every}), so they cannot be "
            "quantized; load it with from_pretrained(..., rescale_every=0), which computes the same"
        )
