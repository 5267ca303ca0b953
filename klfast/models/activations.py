"""The quantized layers of a model that round their input to int8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from klfast.models.matrices import matrices, named_matrices


def int8_layers(model: nn.Module) -> list[str]:
    """Return the names of the matrices whose ``activation`` is "int8", in module order; of a stack, of any expert."""
    found = matrices(model).items()
    return [name for name, one in found if any(layer.activation == "int8" for layer in one.quantized_layers)]


@contextmanager
def exact_activations(model: nn.Module) -> Iterator[None]:
    """Let no layer round its input; afterwards each does what it did before."""
    layers = (layer for one in named_matrices(model).values() for layer in one.quantized_layers)
    before = {layer: layer.activation for layer in layers}
    try:
        for layer in before:
            layer.activation = "exact"
        yield
    finally:
        for layer, activation in before.items():
            layer.activation = activation
