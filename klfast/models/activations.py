"""The quantized layers of a model that round their input to int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from klfast.models.matrices import matrices, named_matrices
from klfast.nn import QuantLinear


def int8_layers(model: nn.Module) -> list[str]:
    """Return the names of the matrices whose ``activation`` is "int8", in module order."""
    held = ((name, one.holder) for name, one in matrices(model).items())
    return [name for name, holder in held if isinstance(holder, QuantLinear) and holder.activation == "int8"]


@contextmanager
def exact_activations(model: nn.Module) -> Iterator[None]:
    """Let no layer round its input; afterwards each does what it did before."""
    holders = (one.holder for one in named_matrices(model).values())
    before = {holder: holder.activation for holder in holders if isinstance(holder, QuantLinear)}
    try:
        for layer in before:
            layer.activation = "exact"
        yield
    finally:
        for layer, activation in before.items():
            layer.activation = activation
