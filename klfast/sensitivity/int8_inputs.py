"""A layer's input rounded to int8 for a while, as quantized layers with ``activation="int8"`` round theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from klfast import reference
from klfast.models.block_chain import replaced_forwards
from klfast.nn import QuantExperts
from klfast.quant.spec import QuantSpec


def rounded(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return x [..., K] in its dtype, rounded to int8 per row and group of a weight [N, K] in ``spec``."""
    return reference.fake_quantize_rows(x.float(), spec).to(x.dtype)


def int8_inputs(
    holders: Sequence[nn.Module], attribute: str, spec: QuantSpec, expert: int | None = None
) -> AbstractContextManager[None]:
    """Round the input of the modules that hold one matrix (``klfast.models.matrices.Matrix``), its weight being exact.

    Where a model multiplies by the weight without calling the layer (dt_proj of Mamba), nothing is rounded, as in the
    quantized model. Of a stack, the input of all experts is rounded, or of one ``expert`` alone.
    """
    return replaced_forwards(holders, lambda index: _rounding(holders[index], attribute, spec, expert))


def _rounding(holder: nn.Module, attribute: str, spec: QuantSpec, expert: int | None) -> Callable[..., object]:
    if not isinstance(holder, nn.Linear):
        return _RoundingExperts(holder, attribute, spec, expert).forward
    forward = holder.forward
    return lambda input: forward(rounded(input, spec))


class _RoundingExperts(QuantExperts):
    """A mixture's experts in full precision, which round the input of one of their stacks, or of one expert in it."""

    def __init__(self, experts: nn.Module, stack: str, spec: QuantSpec, expert: int | None) -> None:
        super().__init__(experts, {})
        self._stack, self._spec, self._expert = stack, spec, expert

    def product(self, name: str, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if name != self._stack:
            return super().product(name, x, index)
        y = super().product(name, rounded(x, self._spec), index)
        if self._expert is None:
            return y
        return torch.where((index == self._expert).unsqueeze(-1), y, super().product(name, x, index))
