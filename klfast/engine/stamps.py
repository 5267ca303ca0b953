"""``stamp``: notices that the values of a tensor were written to."""

from __future__ import annotations

import torch

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def stamp(t: torch.Tensor) -> tuple[int | None, int]:
    """Return what changes once the values of a tensor on the CPU do: torch's count of writes, and a sum of all bits.

    Not all writes are counted: those of fused optimizers are not, nor those to ``t.data`` or to the memory behind, nor
    any to an inference tensor, which has no count (None here). The sum notices these, but for one that only moves
    values to other places, or whose changes cancel out to the last bit.
    """
    return None if t.is_inference() else t._version, int(_words(t.detach()).sum())


def _words(t: torch.Tensor) -> torch.Tensor:
    """Return the values as integers [n], as wide as size and place in memory allow."""
    flat = t.contiguous().view(-1)
    begin, size = flat.storage_offset() * flat.itemsize, flat.nbytes
    wide = next(dtype for dtype in _WORDS if not (begin | size) % dtype.itemsize)
    return flat.view(wide)
