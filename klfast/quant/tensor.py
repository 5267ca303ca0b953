"""QuantizedTensor: the parts of a quantized weight, with what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from klfast.core.errors import InvalidInputError
from klfast.quant.formats import Part, check_parts
from klfast.quant.layouts import Layout
from klfast.quant.spec import QuantSpec


class Stored(NamedTuple):
    """What the tensors of a quantized weight mean.

    Attributes:
        shape: N, K.
        spec, layout: how it is quantized, and where its values lie.
        parts: what its tensors must be, in the order in which ops take them.
        formats: the name of the spec's format, alone.
    """

    shape: tuple[int, int]
    spec: QuantSpec
    layout: Layout
    parts: tuple[Part, ...]
    formats: tuple[str]

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise InvalidInputError unless these are the parts."""
        if len(tensors) == len(self.parts):  # the loop of check_parts: a call of it costs a small op 3 %
            for tensor, (_, shape, dtypes) in zip(tensors, self.parts):  # noqa: B905 (as many as each other)
                if tensor.shape != shape or tensor.dtype not in dtypes:
                    break
            else:
                return
        check_parts(tensors, self.parts, self.layout)


@lru_cache(4096)
def stored(n: int, k: int, spec: str, layout: str) -> Stored:
    """Return what an op's arguments say of a weight; quick for one that was asked for before.

    Raises:
        InvalidInputError: no such spec or layout, or a layout that the format does not have.
    """
    parsed, found = parse(spec, layout)
    return Stored((n, k), parsed, found, parsed.format.parts((n, k), parsed, found), (parsed.format.name,))


@lru_cache(4096)
def parse(spec: str, layout: str) -> tuple[QuantSpec, Layout]:
    """Return what these texts name.

    Raises:
        InvalidInputError: no such spec or layout, or a layout that the format does not have.
    """
    parsed, found = QuantSpec.parse(spec), next((each for each in Layout if each.value == layout), None)
    if found is None or found not in parsed.format.layouts:
        known = ", ".join(each.value for each in parsed.format.layouts)
        raise InvalidInputError(f"a weight in {parsed.format.name} has no layout {layout!r} (its layouts: {known})")
    return parsed, found


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized [N, K] weight matrix.

    Attributes:
        parts: its tensors, as ``spec.format.parts`` describes them: of packed integers packed, scale and, if asymmetric,
            zero_point (see ``Layout``).
        shape: N, K.
        spec, layout: how it is quantized, and where its values lie.
    """

    parts: Sequence[torch.Tensor]
    shape: tuple[int, int]
    spec: QuantSpec
    layout: Layout = Layout.PLAIN

    def __post_init__(self) -> None:
        self.spec.format.check(self.parts, self.shape, self.spec, self.layout)

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int],
        spec: QuantSpec,
        *,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str = "meta",
    ) -> QuantizedTensor:
        """A plain tensor to be filled in; parts that may have ``scale_dtype`` have it."""
        parts = [
            torch.empty(part.shape, dtype=scale_dtype if scale_dtype in part.dtypes else part.dtypes[0], device=device)
            for part in spec.format.parts(shape, spec)
        ]
        return cls(parts, shape, spec)

    @property
    def stored(self) -> Stored:
        """What the parts mean."""
        return stored(*self.shape, self.spec.text, self.layout.value)

    def part(self, name: str) -> torch.Tensor | None:
        """The part of that name; None if a weight of this spec has none."""
        named = zip(self.spec.format.parts(self.shape, self.spec, self.layout), self.parts, strict=True)
        return next((tensor for part, tensor in named if part.name == name), None)

    @property
    def packed(self) -> torch.Tensor | None:
        return self.part("packed")

    @property
    def scale(self) -> torch.Tensor | None:
        return self.part("scale")

    @property
    def zero_point(self) -> torch.Tensor | None:
        return self.part("zero_point")

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        return QuantizedTensor([part.to(device) for part in self.parts], self.shape, self.spec, self.layout)

    def to_layout(self, layout: Layout) -> QuantizedTensor:
        """The same tensor in another layout; itself if it has that already."""
        if layout is self.layout:
            return self
        parts = self.spec.format.convert(self.parts, self.shape, self.spec, self.layout, layout)
        return QuantizedTensor(parts, self.shape, self.spec, layout)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Rows ``index`` (int64 [...]) of the matrix in float32, [..., K]: quick for a few of many."""
        return self.spec.format.decode_rows(self.parts, index, self.shape, self.spec, self.layout)

    def block(self, first: int, end: int) -> QuantizedTensor:
        """Neighbouring rows as views; of a plain tensor ``first`` is a multiple of 32."""
        parts = self.spec.format.slice_rows(self.parts, slice(first, end), self.layout)
        return QuantizedTensor(parts, (end - first, self.shape[1]), self.spec, self.layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] float matrix, computed in ``dtype`` (the scale's by default: bit for bit what
        compressed-tensors decompresses).
        """
        plain = self.to_layout(Layout.PLAIN)
        return self.spec.format.decode(plain.parts, self.shape, self.spec, dtype)
