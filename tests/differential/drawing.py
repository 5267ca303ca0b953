"""Random operands: sizes, values, special ones among them, and ways to lie in memory; all from one seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch

from klfast import QuantizedTensor, QuantSpec, quantize
from klfast.core.dtypes import FLOAT_DTYPES

LARGEST = 300  # of a dimension
_SPECIAL = (  # one of these for a case: kernels count 1e-41 as 0, and 0 times infinity is NaN
    (0.0, -0.0, math.nan, math.inf, -math.inf),
    (0.0, -0.0, 1e-41, -1e-38, 1e-6, 1e6, -1e6),
)


@dataclass
class Draw:
    """The random numbers of one case, and the memory of what was drawn.

    Attributes:
        random: what all comes from.
        memories: (memory, view of it that is an operand, a copy of the memory), one for each float operand.
        special: values that operands have here and there.
    """

    random: random.Random
    memories: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    special: tuple[float, ...] = ()

    def with_special_values(self, probability: float) -> Draw:
        """Let special values occur, in so many cases."""
        self.special = self.random.choice(_SPECIAL) if self.chance(probability) else ()
        return self

    def chance(self, probability: float) -> bool:
        """Return True that often."""
        return self.random.random() < probability

    def size(self, most: int = LARGEST, least: int = 0) -> int:
        """Return a size from ``least`` to ``most``, the small ones more often; 0 seldom."""
        if least == 0 and self.chance(0.02):
            return 0
        return min(most, max(least, int(math.exp(self.random.uniform(0, math.log(most + 1))))))

    def dtype(self) -> torch.dtype:
        """Return a float dtype."""
        return self.random.choice(FLOAT_DTYPES)

    def maybe(self, value: Any) -> Any:
        """Return the value, or None."""
        return value if self.chance(0.5) else None

    def normal(self, *shape: int, dtype: torch.dtype | None = None, spread: float = 1.0, **how: bool) -> torch.Tensor:
        """Return normally distributed values, or small integers, of a standard deviation near ``spread``."""
        values = torch.randn(shape) * spread if self.chance(0.8) else torch.randint(-3, 4, shape).float() * spread
        return self.laid_out(values, dtype or self.dtype(), **how)

    def between(self, low: float, high: float, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return evenly distributed values."""
        return self.laid_out(low + (high - low) * torch.rand(shape), dtype or self.dtype())

    def laid_out(self, values: torch.Tensor, dtype: torch.dtype, *, written: bool = False) -> torch.Tensor:
        """Return a view of new memory, full of NaN elsewhere, that has the values, or some of them many times.

        Args:
            values: float32.
            dtype: of the view.
            written: the elements of the view must not share memory.
        """
        values = values.clone(memory_format=torch.contiguous_format)
        if self.special and values.numel() and self.chance(0.3):
            for _ in range(self.random.randint(1, 3)):
                values.view(-1)[self.random.randrange(values.numel())] = self.random.choice(self.special)
        kind = self.random.random()
        if kind < 0.1 and values.dim() and not written:
            view = self._overlapping(values, dtype)
        elif kind < 0.2 and values.dim() and not written:
            view = self._expanded(values, dtype)
        else:
            view = self._with_gaps(values, dtype, plain=kind > 0.7)
        memory = view.new_empty(0).set_(view.untyped_storage())
        self.memories.append((memory, view, memory.clone()))
        return view

    def _with_gaps(self, values: torch.Tensor, dtype: torch.dtype, plain: bool) -> torch.Tensor:
        """Lay values out in a random order of dimensions, with other numbers around them unless ``plain``."""
        order = list(range(values.dim()))
        steps = [1] * values.dim()
        before = after = 0
        if not plain:
            self.random.shuffle(order)
            steps = [self.random.choice((1, 1, 1, 2, 3)) for _ in order]
            before, after = self.random.randint(0, 3), self.random.randint(0, 5)
        strides, stride = [0] * values.dim(), 1
        for place, dim in enumerate(reversed(order)):
            stride *= steps[dim]
            strides[dim] = stride
            stride *= max(values.shape[dim], 1)
            if place == 0 and not plain:
                stride += after
        memory = torch.full((before + stride + after,), math.nan, dtype=dtype)
        return memory.as_strided(values.shape, strides, before).copy_(values)

    def _expanded(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Repeat the values of one index along a dimension, without memory for the others."""
        dim = self.random.randrange(values.dim())
        one = self._with_gaps(values.narrow(dim, 0, min(values.shape[dim], 1)), dtype, plain=False)
        return one.expand(values.shape) if values.shape[dim] else one

    def _overlapping(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Let each row begin a few elements after the one before."""
        strides = [self.random.randint(1, 4) for _ in values.shape]
        reach = sum(stride * max(size - 1, 0) for stride, size in zip(strides, values.shape, strict=True)) + 1
        flat = values.reshape(-1)[:reach]
        memory = flat.new_zeros(reach).to(dtype)
        memory[: flat.numel()] = flat.to(dtype)
        return memory.as_strided(values.shape, strides)

    def quantized(self, n: int, k: int, corrected: bool = False) -> QuantizedTensor:
        """Return a quantized matrix of any format, group size, scale dtype and signs of the scales."""
        group = self.random.choice((-1, 16, 32, 64, 128, self.random.randint(1, LARGEST)))
        spec = QuantSpec(self.random.choice((4, 6, 8)), group, self.chance(0.5))
        scale_dtype = self.random.choice(FLOAT_DTYPES)
        if not n or not k:
            parts = [torch.zeros(part.shape, dtype=part.dtypes[0]) for part in spec.format.parts((n, k), spec)]
            return QuantizedTensor(parts, (n, k), spec)
        weight = torch.randn(n, k) + torch.randn(n, 1)
        if corrected and self.chance(0.1):
            spec = QuantSpec(spec.bits, spec.group_size, spec.symmetric, corrected=self.random.randint(1, n))
            return quantize(weight, spec, scale_dtype=scale_dtype)
        packed, scale, *rest = quantize(weight, spec, scale_dtype=scale_dtype).parts
        if self.chance(0.3):
            scale = torch.where(torch.rand(scale.shape) < 0.5, -scale, scale)
        return QuantizedTensor([packed, scale, *rest], (n, k), spec)
