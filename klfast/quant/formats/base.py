"""What a quantization format has to say of itself, so that ops, files, sweeps and plans need not know it."""

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
    """How scales are shared, beside the format itself: what a format asks of a QuantSpec."""

    @property
    def group_size(self) -> int: ...  # -1: one group a row

    @property
    def symmetric(self) -> bool: ...

    def group_length(self, in_features: int, /) -> int: ...

    def n_groups(self, in_features: int, /) -> int: ...


class Part(NamedTuple):
    """One stored tensor of a weight: its name, shape and the dtypes that it may have. ``dtypes[0]`` is the usual one."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]

    def check(self, tensor: torch.Tensor, of: str = "") -> None:
        """Raise InvalidInputError unless a tensor is what this part must be; ``of`` says of what, for the message."""
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
    """A way to store a weight matrix in few bits: an instance for each, in ``formats.FORMATS`` by its name.

    A format knows nothing of ops. Kernels say which formats they take (``dispatch.registry.register_kernel``).

    Attributes:
        name: in specs and files, such as "int4": ``kind``, then ``bits``.
        kind: lower-case letters; formats of one kind differ in their bits.
        bits: of a stored value, without its share of the scales.
        layouts: that it can have.
        has_zero_points: whether a spec may be asymmetric.
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
        """Round groups, float32 [N, G, L], each with the ratio, of its full range, of the least squared error."""

    @abstractmethod
    def restore(self, rounded: Rounded) -> torch.Tensor:
        """Return what rounded groups stand for, float32 [N, G, L]; may write over the codes."""

    # Storage ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> tuple[Part, ...]:
        """Return the parts of a weight in the order in which ops take them."""

    @abstractmethod
    def encode(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> list[torch.Tensor]:
        """Return the plain parts of codes int8 [N, K], scales [N, G] and zero points int8 [N, G]."""

    @abstractmethod
    def decode(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return the matrix [N, K] that plain parts stand for, computed in ``dtype`` (the scale's by default)."""

    @abstractmethod
    def decode_rows(
        self,
        parts: Sequence[torch.Tensor],
        index: torch.Tensor,
        shape: Shape,
        spec: Grouping,
        layout: Layout = Layout.PLAIN,
    ) -> torch.Tensor:
        """Return rows ``index`` (int64 [...]) of ``decode`` in float32, [..., K]: quick for a few of many."""

    @abstractmethod
    def slice_rows(
        self, parts: Sequence[torch.Tensor], rows: slice, layout: Layout = Layout.PLAIN
    ) -> list[torch.Tensor]:
        """Return the parts of neighbouring rows, as views. A slice of plain parts begins at a multiple of 32."""

    @abstractmethod
    def convert(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, source: Layout, target: Layout
    ) -> list[torch.Tensor]:
        """Return the parts in another layout."""

    def check(self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> None:
        """Raise InvalidInputError unless these are the parts of such a weight."""
        check_parts(parts, self.parts(shape, spec, layout), layout)

    def nbytes(self, shape: Shape, spec: Grouping) -> int:
        """Return the bytes of a plain weight, all parts together, each in its usual dtype."""
        return sum(_count(part.shape) * part.dtypes[0].itemsize for part in self.parts(shape, spec))

    # Files ------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def storable_group(self, group_size: int, in_features: int) -> int:
        """Return the largest group size, not above the one asked for, that a saved weight can have."""

    @abstractmethod
    def to_compressed_tensors(self, spec: Grouping) -> dict[str, object]:
        """Return a config group of compressed-tensors' quantization_config but for its targets."""

    @abstractmethod
    def from_compressed_tensors(self, group: Mapping[str, Any]) -> tuple[int, bool] | None:
        """Return (group size, symmetric) of such a config group; None if another format wrote it.

        Raises:
            KeyError, TypeError: the group is damaged.
        """


def check_parts(parts: Sequence[torch.Tensor], expected: Sequence[Part], layout: Layout) -> None:
    """Raise InvalidInputError unless ``parts`` are the expected ones; ``layout`` is theirs, for the message."""
    if len(parts) != len(expected):
        names = ", ".join(part.name for part in expected)
        raise InvalidInputError(f"the parts of this weight are {names}, got {len(parts)} tensors")
    for tensor, part in zip(parts, expected):  # noqa: B905 (as many as each other)
        if tensor.shape != part.shape or tensor.dtype not in part.dtypes:
            part.check(tensor, "" if layout is Layout.PLAIN else f" of a {layout.value} weight")


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
