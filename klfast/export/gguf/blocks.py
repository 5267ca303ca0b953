"""Quantized matrices as blocks of GGUF, without rounding a code again.

A block has 32 weights of a row (ggml-common.h of llama.cpp, block_q4_0, block_q4_1, block_q8_0), so a group of klfast's
that is some blocks long gives its scale to each. Scales, and minima of Q4_1, are float16.
"""

from __future__ import annotations

import numpy as np
import torch

from klfast.core.errors import InvalidInputError
from klfast.export.gguf.change import Change
from klfast.quant import packing
from klfast.quant.spec import QuantSpec
from klfast.quant.tensor import QuantizedTensor

BLOCK = 32
# By bits and symmetry. Six bits, less their zero points, fit into eight.
_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (6, True): "Q8_0", (6, False): "Q8_0", (8, True): "Q8_0"}


def exact_kind(spec: QuantSpec) -> str | None:
    """Return the type that holds a spec's codes; None if there is none."""
    return _KINDS.get((spec.bits, spec.symmetric))


def nearest_kind(spec: QuantSpec, k: int) -> str:
    """Return the type for weights that are rounded anew; float16 for rows that are not whole blocks."""
    return "F16" if k % BLOCK else "Q4_0" if spec.bits == 4 else "Q8_0"


def misfit(spec: QuantSpec, k: int, change: Change) -> str | None:
    """Say why blocks cannot hold a matrix with rows of ``k``; None if they can."""
    if exact_kind(spec) is None:
        return f"zero points of {spec.bits} bits"
    if (length := spec.group_length(k)) % BLOCK:
        return f"groups of {length}"
    return None if change.columns is None or _moves_blocks(change.columns) else "columns reordered within groups"


def _moves_blocks(columns: torch.Tensor) -> bool:
    blocks = columns.view(-1, BLOCK)
    return torch.equal(blocks, blocks[:, :1] // BLOCK * BLOCK + torch.arange(BLOCK))


def encoded(qt: QuantizedTensor, change: Change) -> np.ndarray:
    """Return a matrix as bytes, uint8 [N, bytes of a row], after a change.

    Raises:
        InvalidInputError: a scale is beyond float16.
    """
    n, k = qt.shape
    codes = _codes(qt)
    scale = _by_block(_part(qt, "scale"), qt.spec, k).float()
    zero = (
        _by_block(packing.unpack(_part(qt, "zero_point").T, qt.spec.bits, n).T, qt.spec, k)
        if qt.spec.bits == 4 and not qt.spec.symmetric
        else None
    )
    if change.rows is not None:
        codes, scale = codes[change.rows], scale[change.rows]
        zero = None if zero is None else zero[change.rows]
    if change.columns is not None:
        blocks = change.columns[::BLOCK] // BLOCK
        codes, scale = codes[:, change.columns], scale[:, blocks]
        zero = None if zero is None else zero[:, blocks]
    scale = scale * change.row_factor(scale)
    fields = [scale] if zero is None else [scale, -scale * zero]
    halves = [field.half() for field in fields]
    if not all(half.isfinite().all() for half in halves):
        raise InvalidInputError("a scale is beyond float16, in which GGUF holds scales")
    codes = codes.view(*scale.shape, BLOCK)
    if zero is not None:
        codes = codes + zero.unsqueeze(-1)
    elif qt.spec.bits == 4:
        codes = codes + 8
    bytes_ = _nibbles(codes.to(torch.uint8)) if qt.spec.bits == 4 else codes.to(torch.int8).view(torch.uint8)
    joined = torch.cat([*(half.unsqueeze(-1).view(torch.uint8) for half in halves), bytes_], -1)
    return joined.flatten(1).numpy()


def _codes(qt: QuantizedTensor) -> torch.Tensor:
    """Return codes less their zero points, int16 [N, K]."""
    parts = [torch.ones_like(part) if part.is_floating_point() else part for part in qt.parts]
    return QuantizedTensor(parts, qt.shape, qt.spec).dequantize(torch.float32).to(torch.int16)


def _part(qt: QuantizedTensor, name: str) -> torch.Tensor:
    part = qt.part(name)
    assert part is not None
    return part


def _by_block(of_groups: torch.Tensor, spec: QuantSpec, k: int) -> torch.Tensor:
    """Return a number of each group [N, G] for each block [N, K / 32]."""
    return of_groups.repeat_interleave(spec.group_length(k) // BLOCK, 1)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return uint8 [..., 32] below 16 as [..., 16]: the first half of the block in the low bits."""
    return codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
