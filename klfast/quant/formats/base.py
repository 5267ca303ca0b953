"""The interface of quantization formats, through which ops, files, sweeps and plans use them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from klfast.core.dtypes import dtype_names
from klfast.core.errors import InvalidInputError
from klfast.quant.layouts import Layout

Shape = tuple[int, int]  # N, K: features out and in


class Grouping(Protocol):
    """How scales are shared, apart from the format itself: the part of a QuantSpec that formats use."""

    @property
    def group_size(self) -> int:
        """Features in a group; -1 for one group per row."""

    @property
    def symmetric(self) -> bool:
        """True without zero points."""

    @property
    def corrected(self) -> int:
        """Rows that a second matrix corrects."""

    def group_length(self, in_features: int, /) -> int:
        """Return the features in each group, of which the last may be shorter."""

    def n_groups(self, in_features: int, /) -> int:
        """Return the number of groups in a row."""


class Part(NamedTuple):
    """One stored tensor of a weight: its name, shape and allowed dtypes, of which ``dtypes[0]`` is the usual one."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def check(self, tensor: torch.Tensor, of: str = "") -> None:
        """Raise InvalidInputError unless a tensor fits this part; ``of`` names the weight in the message."""
        if tensor.shape != self.shape:
            raise InvalidInputError(
                f"{self.name}{of} must have shape {list(self.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.dtype not in self.dtypes:
            raise InvalidInputError(f"{self.name}{of} must be {dtype_names(self.dtypes)}, got {tensor.dtype}")


class Rounded(NamedTuple):
    """Groups of a weight, rounded.

    Attributes:
        codes: float32 [N, G, L], whole numbers.
        scale: [N, G, 1], as stored.
        zero_point: float32 [N, G, 1]; None if the format has none.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


class QuantFormat(ABC):
    """A way to store a weight matrix in few bits; ``formats.FORMATS`` holds the instances by name.

    A format does not know the ops. Kernels say which formats they take (``dispatch.registry.register_kernel``).

    Attributes:
        name: in specs and files, such as "int4": ``kind``, then ``bits``.
        kind: lower-case letters; formats of one kind differ in their bits.
        bits: per stored value, without its share of the scales.
        layouts: the possible ones.
        has_zero_points: True if a spec may be asymmetric.
    """

    name: str
    kind: str
    bits: int
    layouts: tuple[Layout, ...]
    has_zero_points: bool

    # Rounding ---------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code."""

    @abstractmethod
    def round(self, groups: torch.Tensor, spec: Grouping, ratios: Sequence[float], scale_dtype: torch.dtype) -> Rounded:
        """Round groups, float32 [N, G, L], each with the ratio of its full range that has the least squared error."""

    @abstractmethod
    def restore(self, rounded: Rounded) -> torch.Tensor:
        """Return the values of rounded groups, float32 [N, G, L]; may overwrite the codes."""

    # Storage ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> tuple[Part, ...]:
        """Return the parts of a weight in the order that ops take."""

    @abstractmethod
    def encode(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> list[torch.Tensor]:
        """Return the plain parts of codes int8 [N, K], scales [N, G] and zero points int8 [N, G]."""

    @abstractmethod
    def decode(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return the matrix [N, K] that plain parts encode, computed in ``dtype`` (the scale's by default)."""

    @abstractmethod
    def decode_rows(
        self,
        parts: Sequence[torch.Tensor],
        index: torch.Tensor,
        shape: Shape,
        spec: Grouping,
        layout: Layout = Layout.PLAIN,
    ) -> torch.Tensor:
        """Return rows ``index`` (int64 [...]) of ``decode`` in float32, [..., K]; quick for a few of many."""

    @abstractmethod
    def slice_rows(
        self, parts: Sequence[torch.Tensor], rows: slice, layout: Layout = Layout.PLAIN
    ) -> list[torch.Tensor]:
        """Return the parts of adjacent rows, as views where the slice begins at a multiple of 32."""

    @abstractmethod
    def join_part(self, name: str, each: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        """Return a plain part of a weight from those of its first ``rows[0]`` rows, the next ``rows[1]`` ..."""

    @abstractmethod
    def convert(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, source: Layout, target: Layout
    ) -> list[torch.Tensor]:
        """Return the parts in another layout."""

    def check(self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> None:
        """Raise InvalidInputError unless these are the parts of such a weight."""
        check_parts(parts, self.parts(shape, spec, layout), layout)

    def nbytes(self, shape: Shape, spec: Grouping) -> int:
        """Return the total bytes of a plain weight's parts, each in its usual dtype."""
        return sum(_count(part.shape) * part.dtypes[0].itemsize for part in self.parts(shape, spec))

    # Files ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def storable_group(self, group_size: int, in_features: int) -> int:
        """Return the largest group size that a saved weight can have, at most the requested one."""

    @abstractmethod
    def to_compressed_tensors(self, spec: Grouping) -> dict[str, object]:
        """Return a config group of compressed-tensors' quantization_config, without its targets."""

    @abstractmethod
    def from_compressed_tensors(self, group: Mapping[str, Any]) -> tuple[int, bool] | None:
        """Return (group size, symmetric) of such a config group; None if another format wrote it.

        Raises:
            KeyError, TypeError: the group is damaged.
        """


def check_parts(parts: Sequence[torch.Tensor], expected: Sequence[Part], layout: Layout) -> None:
    """Raise InvalidInputError unless ``parts`` are the expected ones; ``layout``, theirs, is for the message."""
    if len(parts) != len(expected):
        names = ", ".join(part.name for part in expected)
        raise InvalidInputError(f"the parts of this weight are {names}, got {len(parts)} tensors")
    for tensor, part in zip(parts, expected):  # noqa: B905 (equally many)
        if tensor.shape != part.shape or tensor.dtype not in part.dtypes:
            part.check(tensor, "" if layout is Layout.PLAIN else f" of a {layout.value} weight")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
