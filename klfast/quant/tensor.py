"""QuantizedTensor: the parts of a quantized weight and their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from klfast.core.errors import InvalidInputError
from klfast.quant.formats import ROWS, Part, check_parts
from klfast.quant.layouts import Layout
from klfast.quant.spec import QuantSpec


class Stored(NamedTuple):
    """The meaning of a quantized weight's tensors.

    Attributes:
        shape: N, K.
        spec: how it is quantized.
        layout: of its values in memory.
        parts: descriptions of its tensors, in the order that ops take.
        formats: only the name of the spec's format.
        group_length: input features in a group, at least 1.
    """

    shape: tuple[int, int]
    spec: QuantSpec
    layout: Layout
    parts: tuple[Part, ...]
    formats: tuple[str]
    group_length: int

    def check(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise InvalidInputError unless these are the parts."""
        if len(tensors) == len(self.parts):  # the loop of check_parts, whose call costs a small op 3 %
            for tensor, (_, shape, dtypes) in zip(tensors, self.parts):  # noqa: B905 (equally many)
                if tensor.shape != shape or tensor.dtype not in dtypes:
                    break
            else:
                return
        check_parts(tensors, self.parts, self.layout)


@lru_cache(4096)
def stored(n: int, k: int, spec: str, layout: str) -> Stored:
    """Return the meaning of an op's arguments for a weight; repeated calls are cached.

    Raises:
        InvalidInputError: no such spec or layout, or a layout that the format does not have.
    """
    parsed, found = parse(spec, layout)
    parts = parsed.format.parts((n, k), parsed, found)
    return Stored((n, k), parsed, found, parts, (parsed.format.name,), max(1, parsed.group_length(k)))


@lru_cache(4096)
def parse(spec: str, layout: str) -> tuple[QuantSpec, Layout]:
    """Return the spec and layout that these texts name.

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
        parts: its tensors, as ``spec.format.parts`` describes them: packed, scale and, if asymmetric, zero_point for
            packed integers (see ``Layout``).
        shape: N, K.
        spec: how it is quantized.
        layout: of its values in memory.

    Raises:
        InvalidInputError: the tensors are not these parts, or corrected rows, in the CPU's memory, are none of N.
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
        """Return a plain tensor to be filled in; parts that can have ``scale_dtype`` have it.

        Corrected rows are the first ones.
        """
        parts = []
        for name, sizes, dtypes in spec.format.parts(shape, spec):
            dtype = scale_dtype if scale_dtype in dtypes else dtypes[0]
            make = partial(torch.arange, *sizes) if name == ROWS else partial(torch.empty, sizes)
            parts.append(make(dtype=dtype, device=device))
        return cls(parts, shape, spec)

    @classmethod
    def joined(cls, each: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Return the plain tensor with the rows of several plain ones; InvalidInputError unless K and spec are one."""
        first = each[0]
        if any((qt.shape[1], qt.spec) != (first.shape[1], first.spec) for qt in each):
            raise InvalidInputError("matrices with other inputs or specs cannot be one")
        rows = [qt.shape[0] for qt in each]
        parts = [
            first.spec.format.join_part(part.name, [qt.parts[i] for qt in each], rows)
            for i, part in enumerate(first.stored.parts)
        ]
        return cls(parts, (sum(rows), first.shape[1]), first.spec)

    @classmethod
    def corrected(cls, base: QuantizedTensor, rows: torch.Tensor, correction: QuantizedTensor) -> QuantizedTensor:
        """Return the tensor that is ``base``, with ``correction`` [R, K] added to ``rows``, int [R].

        Raises:
            InvalidInputError: the rows do not rise strictly within those of ``base``, or the tensors do not fit.
        """
        spec = replace(base.spec, corrected=len(rows))
        return cls([*base.parts, rows.to(torch.int32), *correction.parts], base.shape, spec, base.layout)

    @property
    def halves(self) -> tuple[QuantizedTensor, torch.Tensor, QuantizedTensor]:
        """The two tensors and the rows, int32 [R], that ``corrected`` made this one of; views."""
        of_format: Any = self.spec.format
        base, rows, correction = of_format.halves(self.parts)
        shapes = (self.shape, (len(rows), self.shape[1]))
        whole, added = (
            QuantizedTensor(parts, shape, self.spec.base, self.layout)
            for parts, shape in zip((base, correction), shapes, strict=True)
        )
        return whole, rows, added

    @property
    def stored(self) -> Stored:
        """The meaning of the parts."""
        return stored(*self.shape, self.spec.text, self.layout.value)

    def part(self, name: str) -> torch.Tensor | None:
        """Return the part of that name; None if a weight of this spec has none."""
        named = zip(self.spec.format.parts(self.shape, self.spec, self.layout), self.parts, strict=True)
        return next((tensor for part, tensor in named if part.name == name), None)

    @property
    def packed(self) -> torch.Tensor | None:
        """The packed codes."""
        return self.part("packed")

    @property
    def scale(self) -> torch.Tensor | None:
        """The scales."""
        return self.part("scale")

    @property
    def zero_point(self) -> torch.Tensor | None:
        """The zero points; None if symmetric."""
        return self.part("zero_point")

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def device(self) -> torch.device:
        """The device of the parts."""
        return self.parts[0].device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same tensor on another device."""
        return QuantizedTensor([part.to(device) for part in self.parts], self.shape, self.spec, self.layout)

    def to_layout(self, layout: Layout) -> QuantizedTensor:
        """Return the same tensor in another layout; itself if it already has that layout."""
        if layout is self.layout:
            return self
        parts = self.spec.format.convert(self.parts, self.shape, self.spec, self.layout, layout)
        return QuantizedTensor(parts, self.shape, self.spec, layout)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return rows ``index`` (int64 [...]) of the matrix in float32, [..., K]; quick for a few of many."""
        return self.spec.format.decode_rows(self.parts, index, self.shape, self.spec, self.layout)

    def block(self, first: int, end: int) -> QuantizedTensor:
        """Return adjacent rows, as views where ``first`` is a multiple of 32."""
        if self.spec.corrected:
            whole, rows, added = self.halves
            begin, stop = torch.searchsorted(rows, rows.new_tensor([first, end])).tolist()
            part = whole.block(first, end)
            return part if begin == stop else self.corrected(part, rows[begin:stop] - first, added.block(begin, stop))
        parts = self.spec.format.slice_rows(self.parts, slice(first, end), self.layout)
        return QuantizedTensor(parts, (end - first, self.shape[1]), self.spec, self.layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the [N, K] float matrix, computed in ``dtype``.

        By default that is the scale's: bit for bit what compressed-tensors decompresses.
        """
        plain = self.to_layout(Layout.PLAIN)
        return self.spec.format.decode(plain.parts, self.shape, self.spec, dtype)
