"""Values of 4, 6 or 8 bits in int32 words: dense, low bits first; a value may begin in one word and end in the next.

This is compressed-tensors' packing (``pack_to_int32`` of versions 0.19 and 0.20). Values are unsigned here, as stored:
q - q_min.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast.core.dtypes import as_bytes


def packed_words(count: int, bits: int) -> int:
    """Return how many int32 words hold ``count`` values."""
    return -(-count * bits // 32)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [R, C] along its rows into int32 [R, packed_words(C, bits)]; unused high bits are zero."""
    rows, count = values.shape
    words = packed_words(count, bits)
    values = F.pad(values, (0, -count % 4))
    if bits == 4:
        values = values[:, 0::2] | (values[:, 1::2] << 4)
    elif bits == 6:  # four values are three bytes
        a, b, c, d = values.view(rows, values.shape[1] // 4, 4).unbind(-1)
        values = torch.stack((a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)), -1).flatten(1)
    bytes_ = F.pad(values, (0, 4 * words - values.shape[1]))  # or drop the bytes after the last value
    return bytes_.reshape(-1).view(torch.int32).view(rows, words)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first ``count`` values, uint8 [..., count], of int32 [..., at least packed_words(count, bits)]."""
    *leading, columns = words.shape
    values = as_bytes(words).view(*leading, 4 * columns)
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    elif bits == 6:
        values = F.pad(values, (0, -4 * columns % 3))
        a, b, c = values.view(*leading, values.shape[-1] // 3, 3).unbind(-1)
        values = torch.stack((a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2), -1).flatten(-2)
    return values[..., :count]


def unpack_rows(words: torch.Tensor, bits: int, index: torch.Tensor) -> torch.Tensor:
    """Return rows ``index`` (int64 [...]) of values packed along dimension 0, int32 [words, G]: integers [..., G]."""
    bit = index * bits
    first, shift = bit // 32, (bit % 32).unsqueeze(-1)
    values = F.embedding(first, words)
    if 32 % bits:  # with the next word, for values that cross into it
        after = F.embedding((first + 1).clamp(max=words.shape[0] - 1), words)
        values = (values.long() & 0xFFFFFFFF) | (after.long() << 32)
    return (values >> shift) & ((1 << bits) - 1)
