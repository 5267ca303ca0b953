"""Integers of a few bits on a uniform grid, densely packed: ``pack-quantized`` of compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from klfast.core.dtypes import FLOAT_DTYPES
from klfast.quant import layouts, packing
from klfast.quant.formats.base import Grouping, Part, QuantFormat, Rounded, Shape
from klfast.quant.grid import round_to_grid
from klfast.quant.layouts import Layout, Tiling

_STRATEGIES = ("channel", "group")
_AT_ONCE = 1 << 22  # values to convert between layouts
_SCALE_DTYPES = (torch.float16, *(dtype for dtype in FLOAT_DTYPES if dtype is not torch.float16))


class PackedIntegers(QuantFormat):
    """w = (q - zero_point) * scale with q of 4, 6 or 8 bits, signed; symmetric weights have no zero point.

    The parts are packed, scale and, if asymmetric, zero_point; ``Layout`` describes each of them.
    """

    kind = "int"
    layouts = (Layout.PLAIN, Layout.TILED)
    has_zero_points = True

    def __init__(self, bits: int) -> None:
        self.bits, self.name = bits, f"int{bits}"

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def round(self, groups: torch.Tensor, spec: Grouping, ratios: Sequence[float], scale_dtype: torch.dtype) -> Rounded:
        """Round groups to the uniform grid."""
        return Rounded(*round_to_grid(groups, self.range, spec.symmetric, ratios, scale_dtype))

    def restore(self, rounded: Rounded) -> torch.Tensor:
        """Return (q - zero_point) * scale, written over the codes."""
        codes, scale, zero_point = rounded
        return (codes if zero_point is None else codes.sub_(zero_point)).mul_(scale.float())

    def parts(self, shape: Shape, spec: Grouping, layout: Layout = Layout.PLAIN) -> tuple[Part, ...]:
        """Return packed, scale and, if asymmetric, zero_point."""
        (n, k), groups = shape, spec.n_groups(shape[1])
        if layout is Layout.TILED:
            tiling = Tiling.of(k, self.bits, spec.group_size)
            packed = Part("packed", (tiling.n_tiles, n, tiling.block), (torch.uint8,))
            scale = Part("scale", (groups, n), _SCALE_DTYPES)
            zero_point = Part("zero_point", (groups, n), (torch.uint8,))
        else:
            packed = Part("packed", (n, packing.packed_words(k, self.bits)), (torch.int32,))
            scale = Part("scale", (n, groups), _SCALE_DTYPES)
            zero_point = Part("zero_point", (packing.packed_words(n, self.bits), groups), (torch.int32,))
        return (packed, scale) if spec.symmetric else (packed, scale, zero_point)

    def encode(self, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None) -> list[torch.Tensor]:
        """Pack codes and zero points; scales stay as they are."""
        parts = [packing.pack(self._stored(codes), self.bits), scale]
        if zero_point is not None:
            parts.append(packing.pack(self._stored(zero_point).T, self.bits).T.contiguous())
        return parts

    def decode(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Unpack and scale the whole matrix."""
        packed, scale, *zero_point = parts
        dtype = dtype or scale.dtype
        n, k = shape
        length = spec.group_length(k)
        values = self._signed(packing.unpack(packed, self.bits, k)).to(dtype)
        for words in zero_point:
            zero = self._signed(packing.unpack(words.T, self.bits, n).T).to(dtype)
            values = values - zero.repeat_interleave(length, 1)[:, :k]
        return values * scale.to(dtype).repeat_interleave(length, 1)[:, :k]

    def decode_rows(
        self,
        parts: Sequence[torch.Tensor],
        index: torch.Tensor,
        shape: Shape,
        spec: Grouping,
        layout: Layout = Layout.PLAIN,
    ) -> torch.Tensor:
        """Unpack and scale only some rows."""
        if layout is Layout.TILED:
            flat = index.reshape(-1)
            packed, *of_groups = parts
            some = [packed[:, flat], *(part[:, flat] for part in of_groups)]
            some_shape = (flat.numel(), shape[1])
            plain = self.convert(some, some_shape, spec, layout, Layout.PLAIN)
            return self.decode(plain, some_shape, spec, torch.float32).view(*index.shape, shape[1])
        packed, scale, *zero_point = parts
        k, length = shape[1], spec.group_length(shape[1])
        values = packing.unpack(F.embedding(index, packed), self.bits, k)
        if ragged := -k % length:
            values = F.pad(values, (0, ragged))
        groups = values.view(*index.shape, scale.shape[1], length)
        zero = -self.range[0] if not zero_point else packing.unpack_rows(zero_point[0], self.bits, index).unsqueeze(-1)
        return ((groups.float() - zero) * F.embedding(index, scale).float().unsqueeze(-1)).flatten(-2)[..., :k]

    def slice_rows(
        self, parts: Sequence[torch.Tensor], rows: slice, layout: Layout = Layout.PLAIN
    ) -> list[torch.Tensor]:
        """Slice each part; plain zero points are repacked unless whole words are taken."""
        packed, scale, *zero_point = parts
        if layout is Layout.TILED:
            return [part[:, rows] for part in parts]
        if rows.start * self.bits % 32 == 0:
            words = slice(rows.start * self.bits // 32, packing.packed_words(rows.stop, self.bits))
            return [packed[rows], scale[rows], *(part[words] for part in zero_point)]
        index = torch.arange(rows.start, rows.stop, device=packed.device)
        zeros = (packing.unpack_rows(part, self.bits, index).to(torch.uint8) for part in zero_point)
        return [packed[rows], scale[rows], *(packing.pack(part.T, self.bits).T.contiguous() for part in zeros)]

    def join_part(self, name: str, each: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        """Join the tensors; zero points are repacked."""
        if name != "zero_point":
            return torch.cat(list(each))
        zeros = [packing.unpack(words.T, self.bits, n) for words, n in zip(each, rows, strict=True)]
        return packing.pack(torch.cat(zeros, 1), self.bits).T.contiguous()

    def convert(
        self, parts: Sequence[torch.Tensor], shape: Shape, spec: Grouping, source: Layout, target: Layout
    ) -> list[torch.Tensor]:
        """Convert plain parts to tiled ones, or back."""
        if source is target:
            return list(parts)
        (n, k), (packed, scale, *zero_point) = shape, parts
        scale = scale.T.contiguous()
        if target is Layout.PLAIN:
            zeros = [packing.pack(part, self.bits).T.contiguous() for part in zero_point]

            def plain(rows: slice) -> torch.Tensor:
                return packing.pack(layouts.from_tiles(packed[:, rows], k, self.bits, spec.group_size), self.bits)

            return [_by_rows(plain, n, k, 0), scale, *zeros]
        zeros = [packing.unpack(part.T, self.bits, n).contiguous() for part in zero_point]
        filler = zeros[0] if zeros else torch.full_like(scale, -self.range[0], dtype=torch.uint8)

        def tiled(rows: slice) -> torch.Tensor:
            values = packing.unpack(packed[rows], self.bits, k)
            return layouts.to_tiles(values, filler[:, rows], self.bits, spec.group_size)

        return [_by_rows(tiled, n, k, 1), scale, *zeros]

    def storable_group(self, group_size: int, in_features: int) -> int:
        """Return the largest divisor of the features up to ``group_size``: the format has no shorter last group.

        compressed-tensors 0.20 raises "tensor column shape must be divisble by the given group_size"; any divisor down
        to 1 works.
        """
        if group_size == -1 or in_features == 0:
            return group_size
        if group_size >= in_features:
            return -1
        return next(size for size in range(group_size, 0, -1) if in_features % size == 0)

    def to_compressed_tensors(self, spec: Grouping) -> dict[str, object]:
        """Return a ``pack-quantized`` config group, without its targets."""
        return {
            "format": "pack-quantized",
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": spec.symmetric,
                "strategy": "channel" if spec.group_size == -1 else "group",
                "group_size": None if spec.group_size == -1 else spec.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }

    def from_compressed_tensors(self, group: Mapping[str, Any]) -> tuple[int, bool] | None:
        """Return (group size, symmetric) of a config group; None if its bits differ, or it is not one of integers."""
        weights = group["weights"]
        if weights["num_bits"] != self.bits or weights["type"] != "int" or weights["strategy"] not in _STRATEGIES:
            return None
        return -1 if weights["group_size"] is None else weights["group_size"], weights["symmetric"]

    def _stored(self, codes: torch.Tensor) -> torch.Tensor:
        """Return q - q_min of signed q, uint8."""
        return (codes.to(torch.int16) - self.range[0]).to(torch.uint8)

    def _signed(self, stored: torch.Tensor) -> torch.Tensor:
        return (stored.to(torch.int16) + self.range[0]).to(torch.int8)


INT4, INT6, INT8 = (PackedIntegers(bits) for bits in (4, 6, 8))


def _by_rows(convert: Callable[[slice], torch.Tensor], n: int, k: int, dim: int) -> torch.Tensor:
    """Return ``convert(slice(n))``, whose rows lie along ``dim``, in pieces: it needs 8 bytes a value beside."""
    step = max(_AT_ONCE // max(k, 1), 1)
    first = convert(slice(0, min(step, n)))
    if n <= step:
        return first
    whole = first.new_empty([n if i == dim else size for i, size in enumerate(first.shape)])
    whole.narrow(dim, 0, step).copy_(first)
    for begin in range(step, n, step):
        rows = slice(begin, min(begin + step, n))
        whole.narrow(dim, begin, rows.stop - begin).copy_(convert(rows))
    return whole
