"""Changing the layout of a quantized tensor; ``Layout`` says what each is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.quant import packing
from klfast.quant.types import Layout, QuantizedTensor, QuantSpec

RELAID = "the weight is not in the layout of this device; convert it once with .to_layout."  # why an op takes longer


@dataclass(frozen=True)
class Tiling:
    """How ``Layout.TILED`` cuts K input features.

    Attributes:
        block: features in a block, 64 or 32.
        group_blocks: blocks of each group but a shorter last one.
        n_blocks: blocks of all groups.
        n_tiles: what ``packed`` has of them: pairs of blocks for INT4 (the last may lack its second), blocks for INT8.
        is_aligned: whether no block has to be filled up.
    """

    block: int
    group_blocks: int
    n_blocks: int
    n_tiles: int
    is_aligned: bool

    @classmethod
    def of(cls, k: int, bits: int, group_size: int) -> Tiling:
        length = max(k if group_size == -1 else min(group_size, k), 1)
        block = 64 if -(-length // 64) * 64 == -(-length // 32) * 32 else 32
        groups, group_blocks = -(-k // length), -(-length // block)
        n_blocks = (groups - 1) * group_blocks + -(-(k - (groups - 1) * length) // block) if k else 0
        is_aligned = k % block == 0 and length % block == 0
        return cls(block, group_blocks, n_blocks, -(-n_blocks * bits // 8), is_aligned)


def fill_blocks(rows: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """[R, K] with zeros after each group that does not fill its last block: [R, n_blocks * block]."""
    k = rows.shape[1]
    tiling = Tiling.of(k, bits, group_size)
    if tiling.is_aligned:
        return rows
    length = k if group_size == -1 else min(group_size, k)
    groups = F.pad(rows, (0, -k % length)).unflatten(1, (-1, length))
    filled = F.pad(groups, (0, tiling.group_blocks * tiling.block - length)).flatten(1)
    return filled[:, : tiling.n_blocks * tiling.block].contiguous()


def convert(qt: QuantizedTensor, layout: Layout) -> QuantizedTensor:
    """The same tensor in another layout; itself if it has that already."""
    if qt.layout is layout:
        return qt
    return _tiled(qt) if layout is Layout.TILED else _plain(qt)


def parts_in(
    layout: Layout,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    given: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """An op's arguments for a weight whose layout is called ``given``: its parts in ``layout``."""
    spec = QuantSpec(bits, group_size, zero_point is None)
    qt = convert(QuantizedTensor(packed, scale, zero_point, (n, k), spec, Layout(given)), layout)
    return qt.packed, qt.scale, qt.zero_point


def _tiled(qt: QuantizedTensor) -> QuantizedTensor:
    (n, k), bits, group = qt.shape, qt.spec.bits, qt.spec.group_size
    tiling, middle = Tiling.of(k, bits, group), 1 << (bits - 1)
    zero_point = None if qt.zero_point is None else _stored(packing.unpack(qt.zero_point.T, bits, n), bits)  # [G, N]
    # The zero point is taken off first, so that what fills the blocks becomes the zero point too.
    values = packing.unpack(qt.packed, bits, k).to(torch.int16)
    zeros = (
        torch.zeros(n, max(qt.scale.shape[1], 1), dtype=torch.int16, device=qt.device)
        if zero_point is None
        else zero_point.T.to(torch.int16) - middle
    )
    length = max(qt.spec.group_length(k), 1)
    values = fill_blocks(values - zeros.repeat_interleave(length, 1)[:, :k], bits, group)
    blocks = values.unflatten(1, (tiling.n_blocks, tiling.block))  # [N, n_blocks, block]
    of_block = torch.arange(tiling.n_blocks, device=qt.device) // tiling.group_blocks
    stored = (blocks + zeros[:, of_block, None] + middle).to(torch.uint8).transpose(0, 1)  # [n_blocks, N, block]
    if bits == 4:
        if tiling.n_blocks % 2:
            stored = torch.cat((stored, (zeros[None, :, -1:] + middle).to(torch.uint8).expand(1, n, tiling.block)))
        stored = stored[0::2] | stored[1::2] << 4
    return QuantizedTensor(stored.contiguous(), qt.scale.T.contiguous(), zero_point, qt.shape, qt.spec, Layout.TILED)


def _plain(qt: QuantizedTensor) -> QuantizedTensor:
    (n, k), bits = qt.shape, qt.spec.bits
    tiling = Tiling.of(k, bits, qt.spec.group_size)
    blocks = qt.packed
    if bits == 4:
        blocks = torch.stack((blocks & 15, blocks >> 4), 1).flatten(0, 1)[: tiling.n_blocks]
    length = qt.spec.group_length(k)
    filled = blocks.transpose(0, 1).flatten(1)  # [N, n_blocks * block]
    filled = F.pad(filled, (0, -filled.shape[1] % (tiling.group_blocks * tiling.block)))
    values = filled.unflatten(1, (-1, tiling.group_blocks * tiling.block))[..., :length].flatten(1)[:, :k]
    packed = packing.pack(_signed(values, bits), bits)
    zero_point = None if qt.zero_point is None else packing.pack(_signed(qt.zero_point, bits), bits).T.contiguous()
    return QuantizedTensor(packed, qt.scale.T.contiguous(), zero_point, qt.shape, qt.spec)


def _stored(values: torch.Tensor, bits: int) -> torch.Tensor:
    """q - q_min of signed q, uint8."""
    return (values.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)


def _signed(stored: torch.Tensor, bits: int) -> torch.Tensor:
    return (stored.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def rows(qt: QuantizedTensor, index: torch.Tensor) -> QuantizedTensor:
    """The rows ``index`` (int64 [R]) of a tiled tensor, as a tiled tensor."""
    zero_point = None if qt.zero_point is None else qt.zero_point[:, index]
    return QuantizedTensor(
        qt.packed[:, index], qt.scale[:, index], zero_point, (index.numel(), qt.shape[1]), qt.spec, qt.layout
    )


def check_tiled_parts(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, n: int, k: int, spec: QuantSpec
) -> None:
    """Raise InvalidInputError unless the parts of an [n, k] tensor have the shapes and dtypes of ``Layout.TILED``."""
    tiling = Tiling.of(k, spec.bits, spec.group_size)
    groups = spec.n_groups(k)
    for name, tensor, shape, dtypes in (
        ("packed", packed, (tiling.n_tiles, n, tiling.block), (torch.uint8,)),
        ("scale", scale, (groups, n), FLOAT_DTYPES),
        ("zero_point", zero_point, (groups, n), (torch.uint8,)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
            wanted = " or ".join(map(str, dtypes))
            raise InvalidInputError(
                f"{name} of a tiled [{n}, {k}] weight must be {wanted} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
