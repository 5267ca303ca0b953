"""The weight of a linear layer in each form that contenders want, in as many copies as fill the working set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

import klfast
from klfast.benchkit.settings import Settings
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

T = TypeVar("T")
_MOST_COPIES = 4096


class Weights:
    """A random [N, K] weight; copies of a form are made when it is first asked for."""

    def __init__(self, k: int, n: int, settings: Settings) -> None:
        self.k, self.n, self.settings = k, n, settings
        generator = torch.Generator(settings.device).manual_seed(0)
        self.plain = torch.randn(n, k, device=settings.device, generator=generator) / k**0.5
        self._forms: dict[object, list] = {}
        self._quantized: dict[QuantSpec, QuantizedTensor] = {}

    def quantized(self, spec: QuantSpec) -> QuantizedTensor:
        if spec not in self._quantized:
            self._quantized[spec] = klfast.quantize(self.plain, spec)
        return self._quantized[spec]

    def count(self, nbytes: int, most: int = _MOST_COPIES) -> int:
        """How many copies of ``nbytes`` fill the working set; at most ``most``."""
        return min(max(-(-self.settings.working_set // nbytes), 1), most)

    def copies(self, form: object, nbytes: int, copy: Callable[[], T]) -> list[T]:
        """Results of ``copy``, each of ``nbytes``, kept under the name ``form``."""
        if form not in self._forms:
            self._forms[form] = [copy() for _ in range(self.count(nbytes))]
        return self._forms[form]

    def dense(self, dtype: torch.dtype) -> list[nn.Parameter]:
        weight = self.plain.to(dtype)
        return self.copies(dtype, weight.nbytes, lambda: nn.Parameter(weight.clone(), requires_grad=False))

    def klfast(self, spec: QuantSpec) -> list[QuantizedTensor]:
        """As a model holds them once it is loaded."""
        qt = self.quantized(spec)
        return self.copies(
            spec, qt.nbytes, lambda: QuantizedTensor([part.clone() for part in qt.parts], qt.shape, qt.spec, qt.layout)
        )

    def group_size(self, sizes: tuple[int, ...]) -> int | None:
        """The first of ``sizes`` that divides K: what peers without ragged groups can take."""
        return next((size for size in sizes if self.k % size == 0), None)


@functools.lru_cache(maxsize=1)
def weights(k: int, n: int, settings: Settings) -> Weights:
    """The weight of the shape that is being timed; the last one is dropped."""
    return Weights(k, n, settings)
