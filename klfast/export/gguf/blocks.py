"""Quantized matrices as blocks of GGUF, without rounding a code again.

A block has 32 weights of a row (ggml-common.h of llama.cpp, block_q4_0, block_q4_1, block_q8_0), so a group of klfast's
that is some blocks long gives its scale to each. Scales, and minima of Q4_1, are float16: those of other dtypes are
rounded to it, and refused where that loses them.
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
ROUNDING = 2**-11  # of normal numbers to float16, at most, relative
_LOST = 2**-4
# By bits and symmetry. Six bits, less their zero points, fit into eight.
_KINDS = {(4, True): "Q4_0", (4, False): "Q4_1", (6, True): "Q8_0", (6, False): "Q8_0", (8, True): "Q8_0"}


def exact_kind(spec: QuantSpec) -> str | None:
    """Return the type that holds a spec's codes; None if there is none."""
    return None if spec.corrected else _KINDS.get((spec.bits, spec.symmetric))


def nearest_kind(spec: QuantSpec, k: int) -> str:
    """Return the type for weights that are rounded anew; float16 for rows that are not whole blocks."""
    return "F16" if k % BLOCK else "Q4_0" if spec.bits == 4 and not spec.corrected else "Q8_0"


def misfit(spec: QuantSpec, k: int, change: Change) -> str | None:
    """Say why blocks cannot hold a matrix with rows of ``k``; None if they can."""
    if spec.corrected:
        return "corrected rows"
    if exact_kind(spec) is None:
        return f"zero points of {spec.bits} bits"
    if (length := spec.group_length(k)) % BLOCK:
        return f"groups of {length}"
    if k % BLOCK:
        return f"rows of {k}"
    return None if change.columns is None or _moves_blocks(change.columns) else "columns reordered within groups"


def _moves_blocks(columns: torch.Tensor) -> bool:
    blocks = columns.view(-1, BLOCK)
    return torch.equal(blocks, blocks[:, :1] // BLOCK * BLOCK + torch.arange(BLOCK))


def encoded(qt: QuantizedTensor, change: Change) -> np.ndarray:
    """Return a matrix as bytes, uint8 [N, bytes of a row], after a change.

    Raises:
        InvalidInputError: a scale is beyond float16, or a row's are so far below its normal numbers that they are lost:
            rounding them would change the row by more than 2^-4 of its norm.
    """
    is_shifted = exact_kind(qt.spec) == "Q4_1"  # zero points stay zero points only there
    codes = _codes(qt)
    of_blocks = [_by_block(qt, _part(qt, "scale").float()), *([_by_block(qt, _zero_points(qt))] if is_shifted else [])]
    if change.rows is not None:
        codes, *of_blocks = (each[change.rows] for each in (codes, *of_blocks))
    if change.columns is not None:
        codes = codes[:, change.columns]
        of_blocks = [each[:, change.columns[::BLOCK] // BLOCK] for each in of_blocks]
    scale, *zero = of_blocks
    scale = scale * change.row_factor(scale)
    halves = [each.half() for each in (scale, *(-scale * each for each in zero))]
    if not all(each.isfinite().all() for each in halves):
        raise InvalidInputError("a scale is beyond float16, in which GGUF holds scales")
    if scale_loss(qt, change) > _LOST:
        raise InvalidInputError(
            "scales of a row are too small for float16, in which GGUF holds scales; keep this layer in full precision"
        )
    codes = codes.view(*scale.shape, BLOCK)
    if qt.spec.bits == 4:
        bytes_ = _nibbles((codes + (zero[0].unsqueeze(-1) if zero else 8)).to(torch.uint8))
    else:
        bytes_ = codes.to(torch.int8).view(torch.uint8)
    return torch.cat([*(each.unsqueeze(-1).view(torch.uint8) for each in halves), bytes_], -1).flatten(1).numpy()


def scale_loss(qt: QuantizedTensor, change: Change) -> float:
    """Return by how much of its norm float16 scales change a row, at most, counting each block's largest code.

    It is 0 if all scales are normal numbers, 6e-5 or more, which change by no more than 2^-11 of themselves.
    """
    stored = _part(qt, "scale")
    if stored.dtype is torch.float16 and change.factor is None:
        return 0.0
    scale = _by_block(qt, stored.float())
    scale = scale if change.rows is None else scale[change.rows]
    scale = scale * change.row_factor(scale)
    exact = scale.double()  # in which the squares of the smallest numbers are not 0
    errors = exact - scale.half()
    if (errors.abs() <= ROUNDING * exact.abs()).all():
        return 0.0
    largest = _codes(qt).abs().unflatten(1, (-1, BLOCK)).amax(-1)  # 0 in blocks of zeros, whose scales are the smallest
    largest = largest if change.rows is None else largest[change.rows]
    norms = (exact * largest).norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    return float(((errors * largest).norm(dim=-1) / norms).max())


def _codes(qt: QuantizedTensor) -> torch.Tensor:
    """Return codes less their zero points, int16 [N, K]."""
    parts = [torch.ones_like(part) if part.is_floating_point() else part for part in qt.parts]
    return QuantizedTensor(parts, qt.shape, qt.spec).dequantize(torch.float32).to(torch.int16)


def _part(qt: QuantizedTensor, name: str) -> torch.Tensor:
    part = qt.part(name)
    assert part is not None
    return part


def _zero_points(qt: QuantizedTensor) -> torch.Tensor:
    """Return zero points as they are stored, counted from the smallest code, [N, G]."""
    return packing.unpack(_part(qt, "zero_point").T, qt.spec.bits, qt.shape[0]).T


def _by_block(qt: QuantizedTensor, of_groups: torch.Tensor) -> torch.Tensor:
    """Return a number of each group [N, G] for each block [N, K / 32]; the last group may be shorter."""
    k = qt.shape[1]
    return of_groups.repeat_interleave(qt.spec.group_length(k) // BLOCK, 1)[:, : k // BLOCK]


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return uint8 [..., 32] below 16 as [..., 16]: the first half of the block in the low bits."""
    return codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
