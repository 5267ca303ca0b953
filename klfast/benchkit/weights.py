"""The weight of a linear layer in each contender's format, in as many copies as fill the working set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

import klfast
from klfast.benchkit.settings import Settings
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

T = TypeVar("T")
_MOST_COPIES = 4096


class Weights:
    """A random [N, K] weight; copies in a format are made on first use."""

    def __init__(self, k: int, n: int, settings: Settings) -> None:
        self.k, self.n, self.settings = k, n, settings
        generator = torch.Generator(settings.device).manual_seed(0)
        self.plain = torch.randn(n, k, device=settings.device, generator=generator) / k**0.5
        self._forms: dict[object, list[Any]] = {}
        self._quantized: dict[QuantSpec, QuantizedTensor] = {}

    def quantized(self, spec: QuantSpec) -> QuantizedTensor:
        """Return the weight quantized by klfast, in a single copy."""
        if spec not in self._quantized:
            self._quantized[spec] = klfast.quantize(self.plain, spec)
        return self._quantized[spec]

    def count(self, nbytes: int, most: int = _MOST_COPIES) -> int:
        """Return how many copies of ``nbytes`` fill the working set; at most ``most``."""
        return min(max(-(-self.settings.working_set // nbytes), 1), most)

    def copies(self, form: object, nbytes: int, copy: Callable[[], T]) -> list[T]:
        """Return results of ``copy``, each of ``nbytes``, cached under the name ``form``."""
        if form not in self._forms:
            self._forms[form] = [copy() for _ in range(self.count(nbytes))]
        return self._forms[form]

    def dense(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """Return unquantized copies in ``dtype``."""
        weight = self.plain.to(dtype)
        return self.copies(dtype, weight.nbytes, lambda: nn.Parameter(weight.clone(), requires_grad=False))

    def klfast(self, spec: QuantSpec) -> list[QuantizedTensor]:
        """Return quantized copies as a loaded model holds them."""
        qt = self.quantized(spec)
        return self.copies(
            spec, qt.nbytes, lambda: QuantizedTensor([part.clone() for part in qt.parts], qt.shape, qt.spec, qt.layout)
        )

    def group_size(self, sizes: tuple[int, ...]) -> int | None:
        """Return the first of ``sizes`` that divides K, for peers without ragged groups; None if none does."""
        return next((size for size in sizes if self.k % size == 0), None)


@functools.lru_cache(maxsize=1)
def weights(k: int, n: int, settings: Settings) -> Weights:
    """Return the weight of the shape being timed; the previous one is dropped."""
    return Weights(k, n, settings)
