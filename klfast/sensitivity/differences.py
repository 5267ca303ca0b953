"""Products of candidates as the teacher's and one of the difference from it, in int8.

Behind its own block a candidate's hidden states differ little from the teacher's. Where x enters a linear layer, and
the teacher's x_0,

    W x = W x_0 + W (x - x_0)

has a first term in full precision, which the teacher's own pass has left for all candidates, and a second one whose
errors are a share of the difference, however small that is: with W and x - x_0 in int8, KLs of the bundled models'
layers stay within 0.3 % (bench/results/sweep_dtypes.md). Norms, scans and attention meet whole values in full
precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from klfast.backends.cpu.matmul import difference_matmul
from klfast.dispatch.pins import may_run
from klfast.models.block_chain import replaced_forwards
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

LEAST_SIDE = 512  # of a weight: smaller products take no longer than differences, rounding and additions
_GROUPS = (256, 128, 64, 32)
_TIERS = ("avxvnni", "avx512vnni")  # the first that multiply int8 at several times the speed of float32


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Return why int8 products of differences would save no time here, in a few words; empty if they do."""
    if device.type != "cpu":
        return "the model is on a GPU"
    if dtype != torch.float32:
        return f"the sweep computes in {dtype}"
    return "" if any(map(may_run, _TIERS)) else "this CPU has no fast int8 products (AVX-VNNI, AVX-512-VNNI, AMX)"


@dataclass(frozen=True)
class Product:
    """A linear layer's input [B, T, K] and result [B, T, N], float32, of the teacher."""

    input: torch.Tensor
    output: torch.Tensor


Products = dict[nn.Module, Product]  # of a block's large linear layers


class Differences:
    """Large linear layers of a network's blocks, first in the teacher's pass, then in those of candidates."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._weights: dict[nn.Module, QuantizedTensor] = {}

    @contextmanager
    def noted(self, index: int) -> Iterator[Products]:
        """Note what block ``index`` multiplies for a while: of layers that it calls once, with [B, T, K]."""
        layers = [layer for layer in self._blocks[index].modules() if _is_large(layer)]
        calls: list[_Call] = []
        found: Products = {}
        with replaced_forwards(layers, lambda number: _noting(layers[number], calls)):
            yield found
        times = Counter(call.layer for call in calls)
        found.update((call.layer, call.product) for call in calls if times[call.layer] == 1 and call.input.ndim == 3)

    def products(self, teacher: Products) -> AbstractContextManager[None]:
        """Have the layers of which the ``teacher`` has products multiply differences for a while.

        Their input is float32 [C * B, T, K], for stacks of C candidates; others are multiplied as usual.
        """
        layers = list(teacher)
        return replaced_forwards(layers, lambda number: self._product(layers[number], teacher[layers[number]]))

    def _product(self, layer: nn.Module, teacher: Product) -> Callable[[torch.Tensor], torch.Tensor]:
        forward = layer.forward

        def product(input: torch.Tensor) -> torch.Tensor:
            if input.shape[1:] != teacher.input.shape[1:] or len(input) % len(teacher.input):
                found: torch.Tensor = forward(input)
                return found
            return difference_matmul(input, teacher.input, teacher.output, self._weight(layer))

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


class _Call(NamedTuple):
    layer: nn.Module
    input: torch.Tensor
    product: Product  # of copies, as the block may change its own tensors


def _noting(layer: nn.Module, calls: list[_Call]) -> Callable[[torch.Tensor], torch.Tensor]:
    forward = layer.forward

    def product(input: torch.Tensor) -> torch.Tensor:
        same = (call.product.input for call in calls if call.input is input)  # of q, k and v
        copy = next((copy for copy in same if torch.equal(copy, input)), None)
        y: torch.Tensor = forward(input)
        calls.append(_Call(layer, input, Product(_copied(input) if copy is None else copy, _copied(y))))
        return y

    return product


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
