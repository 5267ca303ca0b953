"""Memory layouts of quantized weights, and conversions between them, on plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
import torch.nn.functional as F

RELAID = "the weight is not in the layout of this device; convert it once with .to_layout."  # for warnings


class Layout(Enum):
    """Memory layout of a QuantizedTensor's values; described here for packed integers.

    PLAIN is the ``pack-quantized`` layout of compressed-tensors, the only one that is saved. Values are stored as
    q - q_min (unsigned), the first in the lowest bits of an int32, without gaps:
        packed      int32 [N, ceil(K * bits / 32)]
        scale       float [N, G]
        zero_point  int32 [ceil(N * bits / 32), G], packed along N; absent if symmetric

    TILED is for Triton kernels, made once when a layer moves to a GPU. K is cut into blocks of 64 input features (32
    where that wastes less); each group starts a new block, and its last one is padded with the zero point. The rows of
    a block are adjacent, so that a kernel loads whole tiles in pieces of 16 bytes and needs no masks over K. Values are
    unsigned as above:
        packed      uint8 [T, N, block]. INT8: a tile for each block. INT4: a tile for two blocks, the first in the low
                    bits, the second in the high bits. INT6: the lower four bits as in INT4, then a tile for four blocks
                    with the upper two bits of each, the first block's in the lowest bits
        scale       float [G, N]
        zero_point  uint8 [G, N]; absent if symmetric
    """

    PLAIN = "plain"
    TILED = "tiled"


@dataclass(frozen=True)
class Tiling:
    """The blocks and tiles into which ``Layout.TILED`` cuts K input features.

    Attributes:
        block: features in a block, 64 or 32.
        group_blocks: blocks of each group, of which the last may be shorter.
        n_blocks: blocks of all groups.
        n_tiles: tiles in ``packed``: pairs of blocks for INT4 (the last may lack its second), blocks for INT8; for INT6
            those of INT4, then one for each four blocks.
        turns: of a kernel's loop over K: tiles for INT4 and INT8, blocks for INT6.
        is_aligned: True if no block needs padding.
    """

    block: int
    group_blocks: int
    n_blocks: int
    n_tiles: int
    turns: int
    is_aligned: bool

    @classmethod
    def of(cls, k: int, bits: int, group_size: int) -> Tiling:
        """Return the tiling of K features."""
        length = max(k if group_size == -1 else min(group_size, k), 1)
        block = 64 if -(-length // 64) * 64 == -(-length // 32) * 32 else 32
        groups, group_blocks = -(-k // length), -(-length // block)
        n_blocks = (groups - 1) * group_blocks + -(-(k - (groups - 1) * length) // block) if k else 0
        is_aligned = k % block == 0 and length % block == 0
        tiles = [-(-n_blocks // each) for each in _BLOCKS_A_TILE[bits]]
        turns = tiles[0] if len(tiles) == 1 else n_blocks
        return cls(block, group_blocks, n_blocks, sum(tiles), turns, is_aligned)


_BLOCKS_A_TILE = {4: (2,), 6: (2, 4), 8: (1,)}  # bits -> for each kind of tile in packed


def fill_blocks(rows: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Return [R, K] with each group's last block padded with zeros: [R, n_blocks * block]."""
    k = rows.shape[1]
    tiling = Tiling.of(k, bits, group_size)
    if tiling.is_aligned:
        return rows
    length = k if group_size == -1 else min(group_size, k)
    groups = F.pad(rows, (0, -k % length)).view(len(rows), -(-k // length), length)
    filled = F.pad(groups, (0, tiling.group_blocks * tiling.block - length)).flatten(1)
    return filled[:, : tiling.n_blocks * tiling.block].contiguous()


def to_tiles(values: torch.Tensor, zero: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Lay values out as TILED.

    Args:
        values: uint8 [N, K], as stored.
        zero: uint8 [G, N], the stored value of 0.
        bits: of a value.
        group_size: features in a group, -1 for all.

    Returns:
        ``packed``, uint8 [T, N, block].
    """
    n, k = values.shape
    tiling = Tiling.of(k, bits, group_size)
    length = max(k if group_size == -1 else min(group_size, k), 1)
    zeros = zero.T.to(torch.int16) if zero.shape[0] else zero.new_zeros(n, 1, dtype=torch.int16)
    # Subtract the zero point first, so that the padding becomes the zero point too.
    centred = values.to(torch.int16) - zeros.repeat_interleave(length, 1)[:, :k]
    blocks = fill_blocks(centred, bits, group_size).view(n, tiling.n_blocks, tiling.block)
    of_block = torch.arange(tiling.n_blocks, device=values.device) // tiling.group_blocks
    stored: torch.Tensor = (blocks + zeros[:, of_block, None]).to(torch.uint8).transpose(0, 1)  # [n_blocks, N, block]
    if bits == 8:
        return stored.contiguous()
    # Incomplete pairs or fours of blocks are padded with the zero point as well.
    missing = -tiling.n_blocks % (2 if bits == 4 else 4)
    filler = zeros[None, :, -1:].to(torch.uint8).expand(missing, n, tiling.block)
    stored = torch.cat((stored, filler))
    if bits == 4:
        return stored[0::2] | (stored[1::2] << 4)
    low, high = stored & 15, stored >> 4
    pairs = (low[0::2] | (low[1::2] << 4))[: -(-tiling.n_blocks // 2)]
    return torch.cat((pairs, high[0::4] | (high[1::4] << 2) | (high[2::4] << 4) | (high[3::4] << 6)))


def from_tiles(packed: torch.Tensor, k: int, bits: int, group_size: int) -> torch.Tensor:
    """Return the stored values, uint8 [N, K], of a TILED ``packed``."""
    tiling = Tiling.of(k, bits, group_size)
    blocks = packed
    if bits != 8:
        pairs = packed[: -(-tiling.n_blocks // 2)]
        blocks = torch.stack((pairs & 15, pairs >> 4), 1).flatten(0, 1)[: tiling.n_blocks]
    if bits == 6:
        fours = packed[-(-tiling.n_blocks // 2) :]
        high = torch.stack([(fours >> shift) & 3 for shift in (0, 2, 4, 6)], 1).flatten(0, 1)[: tiling.n_blocks]
        blocks = blocks | (high << 4)
    length = k if group_size == -1 else min(group_size, k)
    filled: torch.Tensor = blocks.transpose(0, 1).flatten(1)  # [N, n_blocks * block]
    filled = F.pad(filled, (0, -filled.shape[1] % (tiling.group_blocks * tiling.block)))
    groups = filled.view(len(filled), filled.shape[1] // (tiling.group_blocks * tiling.block), -1)
    return groups[..., :length].flatten(1)[:, :k]
