"""The linear layers of a causal language model, and the row ranges of fused matrices."""

from __future__ import annotations

from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.models.families import rows_of
from klfast.models.matrices import is_linear, matrices, named_matrices
from klfast.nn.conv1d import as_linear
from klfast.nn.experts import stack_names


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer by module name, in module order, including lm_head: ``matrices`` without experts.

    A Conv1D is seen through ``klfast.nn.conv1d.as_linear``. Layers that share a weight count once, under the first of
    their names.
    """
    return {name: as_linear(one.holder) for name, one in matrices(model).items() if is_linear(one.holder)}


def linear_names(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers under each of their names: a layer that several blocks share has several."""
    return {name: as_linear(one.holder) for name, one in named_matrices(model).items() if is_linear(one.holder)}


def row_parts(model: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """Return the row ranges of a matrix by use, {use: (first, end)}; empty unless it is fused, or a stack of experts.

    Those of a fused layer come from the record of the model's family (klfast.models.families) for the module that
    contains it; those of a stack are "expert 0", "expert 1" ...
    """
    parent, _, leaf = name.rpartition(".")
    holder = model.get_submodule(parent)
    if leaf in stack_names(holder):
        experts, n, _ = getattr(holder, leaf).shape
        return {f"expert {i}": (i * n, (i + 1) * n) for i in range(experts)}
    return dict(rows_of(holder).get(leaf, {}))


def refuse_moving_weights(model: nn.Module) -> None:
    """Raise InvalidInputError if the forward changes weights in place, as RWKV's does with rescale_every."""
    if (every := getattr(getattr(model, "config", None), "rescale_every", 0)) and every > 0:
        raise InvalidInputError(
            f"{type(model).__name__} divides weights in place when it runs (rescale_every={every}), so they cannot be "
            "quantized; load it with from_pretrained(..., rescale_every=0), which computes the same"
        )
