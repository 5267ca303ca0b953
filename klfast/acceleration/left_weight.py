"""Stand-in for a mixer whose forward multiplies a linear layer's weight from the left.

Mamba's forward computes dt as weight @ x [B, R, L], a batch of products with a broadcast left side. That is six times
as slow (bf16, 2 x 512 tokens, 48 to 1536) as x^T weight^T, which equals it and leaves channels contiguous.
"""

from __future__ import annotations

import torch
from torch import nn

from klfast.nn.dense_product import dense_product


class StandIn:
    """The mixer, except that ``mixer.<name>.weight @ x`` runs as a linear layer."""

    def __init__(self, mixer: nn.Module, name: str) -> None:
        self._mixer = mixer
        setattr(self, name, _Projection(getattr(mixer, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(self._mixer, name)


class _Projection:
    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self.weight = _LeftOperand(linear.weight)

    def __getattr__(self, name: str) -> object:
        return getattr(self._linear, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._linear(x)
        return y


class _LeftOperand:
    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __getattr__(self, name: str) -> object:
        return getattr(self._weight, name)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return dense_product(x.transpose(-1, -2), self._weight).transpose(-1, -2)
