"""Value types shared by every stage: what a quantization is, and what a quantized tensor holds."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum

import torch

from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError

SCALES = ("absmax", "mse")  # the ways to choose the scale of a group, see klfast.quantize
SHAPE_BYTES = 16  # of a saved weight_shape, int64 [2], which each quantized layer has
IGNORED_TARGET = -100  # as in torch.nn.functional.cross_entropy


@dataclass(frozen=True, order=True)
class QuantSpec:
    """How a weight matrix is quantized: round to nearest on a uniform grid, one scale per row and group.

    Attributes:
        bits: 4 or 8.
        group_size: consecutive input features that share a scale; -1 for one group per output channel. Where it
            does not divide the number of input features, the last group is shorter.
        symmetric: True for w = q * scale; False for w = (q - zero_point) * scale.

    ``str(spec)`` is for instance ``"int4-g64-sym"``, and ``QuantSpec.parse`` reads it back.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (4, 8):
            raise InvalidInputError(f"bits must be 4 or 8, an integer, got {self.bits!r}")
        if (
            not isinstance(self.group_size, int)
            or isinstance(self.group_size, bool)
            or (self.group_size < 1 and self.group_size != -1)
        ):
            raise InvalidInputError(
                f"group_size must be a positive integer, or -1 for one group a row, got {self.group_size!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise InvalidInputError(f"symmetric must be True or False, got {self.symmetric!r}")

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Return the spec that prints as ``text``; ``int4`` alone stands for the default group and symmetry.

        Raises:
            InvalidInputError: the text does not describe a spec.
        """
        if not isinstance(text, str):
            raise InvalidInputError(
                f"a quantization spec must be a QuantSpec or text such as int4-g64-sym, got {type(text).__name__}"
            )
        match = re.fullmatch(r"int([48])(?:-(channel|g[1-9][0-9]{0,8}))?(?:-(sym|asym))?", text)
        if match is None:
            raise InvalidInputError(f"{text!r} is not a quantization spec (examples: int4-g64-sym, int8-channel-asym)")
        bits, group, symmetry = match.groups()
        size = cls.group_size if group is None else -1 if group == "channel" else int(group[1:])
        return cls(int(bits), size, symmetry != "asym")

    @classmethod
    def of(cls, spec: QuantSpec | str) -> QuantSpec:
        """Return ``spec`` itself, or the one that its text describes (see ``parse``)."""
        return spec if isinstance(spec, cls) else cls.parse(spec)

    @property
    def q_min(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def q_max(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def group_length(self, in_features: int) -> int:
        """Input features in each group but a shorter last one."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def n_groups(self, in_features: int) -> int:
        length = self.group_length(in_features)
        return -(-in_features // length) if in_features else 0

    def nbytes(self, shape: tuple[int, int], scale_bytes: int = 2) -> int:
        """Bytes of a quantized [N, K] weight: packed values, scales, packed zero points."""
        n, k = shape
        groups = self.n_groups(k)
        words = n * packed_words(k, self.bits)
        if not self.symmetric:
            words += packed_words(n, self.bits) * groups
        return 4 * words + scale_bytes * n * groups

    def saved_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a quantized [N, K] weight has in a saved file: ``nbytes`` and weight_shape. Names and offsets, which
        stand in the file's header, are not counted.
        """
        return self.nbytes(shape) + SHAPE_BYTES


def packed_words(count: int, bits: int) -> int:
    """int32 words that hold ``count`` values of ``bits`` bits each."""
    return -(-count * bits // 32)


def storable_spec(spec: QuantSpec, in_features: int) -> QuantSpec:
    """The spec nearest to ``spec`` that a saved [N, in_features] weight can have.

    The file format (``pack-quantized``; compressed-tensors 0.20 raises "tensor column shape must be divisble by the
    given group_size") has no shorter last group: a group size must divide ``in_features``; any divisor will do, down
    to 1. The result's group is the largest such size that is not above the one asked for, so that its error is no
    larger: 1600 inputs in groups of 128 become groups of 100. A group as long as the row, or longer, becomes -1,
    which is the same numbers. In memory (``quantize``, the kernels) every group size is allowed.
    """
    size = spec.group_size
    if size == -1 or in_features == 0:
        return spec
    if size >= in_features:
        return replace(spec, group_size=-1)
    return replace(spec, group_size=next(g for g in range(size, 0, -1) if in_features % g == 0))


class Layout(Enum):
    """Where the values of a QuantizedTensor lie in memory.

    PLAIN is the ``pack-quantized`` layout of compressed-tensors, the only one that is saved. Values are stored as
    q - q_min (unsigned), the first in the lowest bits of an int32:
        packed      int32 [N, ceil(K * bits / 32)]
        scale       float [N, G]
        zero_point  int32 [ceil(N * bits / 32), G], packed along N; absent if symmetric

    TILED is for Triton kernels, made once when a layer comes to a GPU (klfast/quant/layouts.py). K is cut into blocks of 64
    input features (32 where that wastes less); each group starts a new block, and the rest of its last one is filled
    with the zero point. The rows of a block lie side by side, so that a kernel loads whole tiles in pieces of 16 bytes
    and needs no masks over K. Values are unsigned as above:
        packed      uint8 [T, N, block]. INT8: a tile for each block. INT4: a tile for two blocks, the first of them in
                    the low bits, the second in the high bits
        scale       float [G, N]
        zero_point  uint8 [G, N]; absent if symmetric
    """

    PLAIN = "plain"
    TILED = "tiled"


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized [N, K] weight matrix; see ``Layout`` for the shapes of its parts."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    shape: tuple[int, int]
    spec: QuantSpec
    layout: Layout = Layout.PLAIN

    def __post_init__(self) -> None:
        if self.spec.symmetric != (self.zero_point is None):
            raise InvalidInputError(f"{self.spec} {'takes no' if self.spec.symmetric else 'needs a'} zero_point")
        if self.layout is Layout.TILED:
            from klfast.quant.layouts import check_tiled_parts

            check_tiled_parts(self.packed, self.scale, self.zero_point, *self.shape, self.spec)
        else:
            check_parts(
                self.packed, self.scale, self.zero_point, *self.shape, self.spec.bits, self.spec.n_groups(self.shape[1])
            )

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scale, self.zero_point) if t is not None)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        zero_point = None if self.zero_point is None else self.zero_point.to(device)
        return QuantizedTensor(
            self.packed.to(device), self.scale.to(device), zero_point, self.shape, self.spec, self.layout
        )

    def to_layout(self, layout: Layout) -> QuantizedTensor:
        """The same tensor in another layout; itself if it has that already."""
        from klfast.quant import layouts

        return layouts.convert(self, layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The [N, K] float matrix, computed in ``dtype`` (the scale's by default: bit for bit what
        compressed-tensors decompresses).
        """
        from klfast.quant import packing

        return packing.dequantize(self, dtype)


def check_parts(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, n: int, k: int, bits: int, groups: int
) -> None:
    """Raise InvalidInputError unless the parts of an [n, k] tensor have the shapes and dtypes of ``Layout.PLAIN``."""
    _expect("packed", packed, (n, packed_words(k, bits)), (torch.int32,))
    _expect("scale", scale, (n, groups), FLOAT_DTYPES)
    if zero_point is not None:
        _expect("zero_point", zero_point, (packed_words(n, bits), groups), (torch.int32,))


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape:
        raise InvalidInputError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise InvalidInputError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
