"""A format of which some rows have twice the bits: a second matrix of the same format corrects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from klfast.core.errors import InvalidInputError
from klfast.quant.formats.base import Grouping, Part, QuantFormat, Rounded, Shape
from klfast.quant.layouts import Layout

PREFIX = "correction_"
ROWS = f"{PREFIX}rows"


class Halves(NamedTuple):
    """The parts of the whole matrix, the corrected rows int32 [R] in rising order, and the parts of their [R, K]."""

    base: list[torch.Tensor]
    rows: torch.Tensor
    correction: list[torch.Tensor]


class CorrectedRows(QuantFormat):
    """W = B, and W[rows] = B[rows] + C: B [N, K] and the correction C [R, K] in one format, rounded apart.

    Its parts are those of B, correction_rows and, with the prefix "correction_", those of C. Who reads B alone, as
    other readers of files do, has the matrix in the base format. Kernels multiply by both and add.
    """

    def __init__(self, base: QuantFormat) -> None:
        self.base, self.name = base, f"{base.name}+"
        self.kind, self.bits, self.layouts = base.kind, base.bits, base.layouts
        self.has_zero_points = base.has_zero_points

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code of both matrices."""
        return self.base.range

    def round(self, groups: torch.Tensor, spec: Grouping, ratios: Sequence[float], scale_dtype: torch.dtype) -> Rounded:
        """Round groups of either matrix."""
        return self.base.round(groups, spec, ratios, scale_dtype)

    def restore(self, rounded: Rounded) -> torch.Tensor:
        """Return the values of groups of either matrix."""
        return self.base.restore(rounded)

    def parts(self, shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> tuple[Part, ...]:
        """Return the parts of B, the rows, and the parts of C."""
        of_correction = self.base.parts((spec.corrected, shape[1]), spec, layout)
        return (
            *self.base.parts(shape, spec, layout),
            Part(ROWS, (spec.corrected,), (torch.int32,)),
            *(part._replace(name=PREFIX + part.name) for part in of_correction),
        )

    def check(self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> None:
        """Raise InvalidInputError unless these are the parts; rows that are not in the CPU's memory are not read."""
        super().check(parts, shape, spec, layout)
        rows = self.halves(parts).rows
        if not torch.compiler.is_compiling() and type(rows) is torch.Tensor and rows.is_cpu:
            check_rows(rows, shape[0])

    def halves(self, parts: Sequence[torch.Tensor]) -> Halves:
        """Return the parts of B, the rows, and the parts of C."""
        middle = len(parts) // 2
        return Halves(list(parts[:middle]), parts[middle], list(parts[middle + 1 :]))

    def encode(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> list[torch.Tensor]:
        """Raise InvalidInputError: there are two matrices to encode, each in the base format."""
        raise InvalidInputError("a matrix with corrected rows is made of two others (QuantizedTensor.corrected)")

    def decode(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return B with C added to its rows."""
        base, rows, correction = self.halves(parts)
        found = self.base.decode(base, shape, spec, dtype)
        return found.index_add_(0, rows, self.base.decode(correction, (len(rows), shape[1]), spec, dtype))

    def decode_rows(
        self,
        parts: Sequence[torch.Tensor],
        index: torch.Tensor,
        shape: Shape,
        spec: Grouping,
        layout: Layout = Layout.PLAIN,
    ) -> torch.Tensor:
        """Return some rows of B, plus those of C that correct them."""
        base, rows, correction = self.halves(parts)
        place = torch.searchsorted(rows, index.to(rows.dtype)).clamp_(max=len(rows) - 1)
        added = self.base.decode_rows(correction, place, (len(rows), shape[1]), spec, layout)
        is_corrected = F.embedding(place, rows[:, None])[..., 0] == index
        return self.base.decode_rows(base, index, shape, spec, layout) + added * is_corrected.unsqueeze(-1)

    def slice_rows(
        self, parts: Sequence[torch.Tensor], rows: slice, layout: Layout = Layout.PLAIN
    ) -> list[torch.Tensor]:
        """Raise InvalidInputError: how many of them are corrected depends on the rows (QuantizedTensor.block)."""
        raise InvalidInputError("the parts of a matrix with corrected rows cannot be sliced alone")

    def join_part(self, name: str, each: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        """Raise InvalidInputError: the experts of a stack have no corrected rows."""
        raise InvalidInputError("matrices with corrected rows cannot be joined")

    def convert(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, source: Layout, target: Layout
    ) -> list[torch.Tensor]:
        """Convert both matrices."""
        base, rows, correction = self.halves(parts)
        converted = self.base.convert(correction, (len(rows), shape[1]), spec, source, target)
        return [*self.base.convert(base, shape, spec, source, target), rows, *converted]

    def storable_group(self, group_size: int, in_features: int) -> int:
        """Return the base format's."""
        return self.base.storable_group(group_size, in_features)

    def to_compressed_tensors(self, spec: Grouping) -> dict[str, object]:
        """Return the config group of B; klfast.json has the number of corrected rows."""
        return self.base.to_compressed_tensors(spec)

    def from_compressed_tensors(self, group: Mapping[str, Any]) -> tuple[int, bool] | None:
        """Return None: the base format reads it."""
        return None


def check_rows(rows: torch.Tensor, n: int) -> None:
    """Raise InvalidInputError unless rows, int32 [R], rise strictly within 0 to n - 1; a GPU is waited for.

    Kernels read and write at these rows unchecked. On the meta device they have no values.
    """
    if rows.is_meta:
        return
    found = rows.cpu().numpy()  # whose operations cost a third of torch's at this size
    if len(found) and not (found[0] >= 0 and found[-1] < n and (found[1:] > found[:-1]).all()):
        raise InvalidInputError(f"{ROWS} must rise strictly within 0 to {n - 1}")
