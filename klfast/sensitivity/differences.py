"""Products of candidates as the teacher's and one of the difference from it, in int8.

Behind its own block a candidate's hidden states differ little from the teacher's. Where x enters a linear layer, and
the teacher's x_0,

    W x = W x_0 + W (x - x_0)

has a first term in full precision, which all candidates of a stack share, and a second one whose errors are a share of
the difference, however small that is: with W and x - x_0 in int8, KLs of the bundled models' layers stay within 0.2 %
(bench/results/sweep_dtypes.md). Norms, scans and attention meet whole values in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from klfast import ops
from klfast.dispatch.pins import may_run
from klfast.models.block_chain import replaced_forwards
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

FEWEST = 4  # candidates of a stack: for fewer, the teacher's pass beside them costs more than int8 saves
LEAST_SIDE = 512  # of a weight: smaller products take no longer than differences, rounding and additions
_GROUPS = (128, 64, 32)
_TIERS = ("avxvnni", "avx512vnni")  # the first that multiply int8 at several times the speed of float32


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Return why int8 products of differences would save no time here, in a few words; empty if they do."""
    if device.type != "cpu":
        return "the model is on a GPU"
    if dtype != torch.float32:
        return f"the sweep computes in {dtype}"
    return "" if any(map(may_run, _TIERS)) else "this CPU has no fast int8 products (AVX-VNNI, AVX-512-VNNI, AMX)"


class Differences:
    """Linear layers of a network's blocks, for stacks whose first windows are the teacher's."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._weights: dict[nn.Module, QuantizedTensor] = {}

    def products(self, index: int, windows: int) -> AbstractContextManager[None]:
        """Have large linear layers of block ``index`` multiply so for a while.

        Their input is float32 [C * B, T, K], of which the first B = ``windows`` are the teacher's; others than of three
        dimensions are multiplied as usual.
        """
        layers = [layer for layer in self._blocks[index].modules() if _is_large(layer)]
        return replaced_forwards(layers, lambda number: self._product(layers[number], windows))

    def _product(self, layer: nn.Module, windows: int) -> Callable[[torch.Tensor], torch.Tensor]:
        forward = layer.forward

        def product(input: torch.Tensor) -> torch.Tensor:
            if input.ndim != 3 or len(input) % windows:  # tokens of a mixture's expert
                found: torch.Tensor = forward(input)
                return found
            teacher, *candidates = input.split(windows)
            y = input.new_empty(*input.shape[:-1], len(layer.get_parameter("weight")))
            of_teacher, *others = y.split(windows)
            of_teacher.copy_(forward(teacher))
            weight = self._weight(layer)
            for candidate, other in zip(candidates, others, strict=True):
                of_difference = ops.dequant_matmul(candidate - teacher, weight, activation="int8")
                torch.add(of_difference, of_teacher, out=other)
            return y

        return product

    def _weight(self, layer: nn.Module) -> QuantizedTensor:
        if layer not in self._weights:
            weight = layer.get_parameter("weight").detach()
            group = next(group for group in _GROUPS if weight.shape[1] % group == 0)
            self._weights[layer] = quantize(weight, QuantSpec(8, group))
        return self._weights[layer]


def _is_large(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Linear)
        and layer.weight.dtype == torch.float32
        and min(layer.weight.shape) >= LEAST_SIDE
        and layer.in_features % _GROUPS[-1] == 0
    )
