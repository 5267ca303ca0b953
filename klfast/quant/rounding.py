"""Rounding of a float matrix to a QuantizedTensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klfast.core.dtypes import FLOAT_DTYPES, FLOAT_NAMES
from klfast.core.errors import InvalidInputError
from klfast.quant.formats import Rounded
from klfast.quant.spec import SCALES, QuantSpec
from klfast.quant.tensor import QuantizedTensor

_CLIP_RATIOS = torch.linspace(1.0, 0.5, 26).tolist()
_TILE = 1 << 18  # weights per block on the CPU, so that repeated passes hit the cache


def quantize(
    weight: torch.Tensor, spec: QuantSpec | str, *, scale: str = "absmax", scale_dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """Quantize a weight matrix, round to nearest (half to even).

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite, with at least one row and column.
        spec: format, group and symmetry; or its text, such as "int4-g64-sym".
        scale: "absmax" (the largest magnitude maps to q_max; if asymmetric, the range min..max, extended to include
            0, maps to q_min..q_max) or "mse" (that range shrunk by the ratio, of 26 from 1 to 0.5, with the least
            squared error per group).
        scale_dtype: of the stored scales. Values are rounded with the stored scale, so its rounding costs next to
            nothing. float16 scales below 6e-5 are coarse and rounded up, so that no weight is clipped; the smallest is
            6e-8, so weights below 3e-8 become 0. Pass bfloat16 for matrices of such small weights.

    Corrected rows are those that the spec names, or else those with the largest squared error.

    Raises:
        InvalidInputError: wrong dtype or shape, a NaN or infinity, a scale beyond ``scale_dtype``'s range, or fewer
            rows than the spec corrects.
    """
    spec = QuantSpec.of(spec)
    _check(weight, scale, scale_dtype)
    if spec.corrected:
        return _corrected(weight, spec, scale, scale_dtype)
    n, k = weight.shape
    n_groups = spec.n_groups(k)
    q = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    s = torch.empty(n, n_groups, dtype=scale_dtype, device=weight.device)
    z = None if spec.symmetric else torch.empty(n, n_groups, dtype=torch.int8, device=weight.device)
    for rows, columns, groups, tile in _rounded_tiles(weight, spec, scale, scale_dtype):
        q[rows, columns] = tile.codes.flatten(1)
        s[rows, groups] = tile.scale.squeeze(-1)
        if z is not None and tile.zero_point is not None:
            z[rows, groups] = tile.zero_point.squeeze(-1)
    return QuantizedTensor(spec.format.encode(q, s, z), (n, k), spec)


def fake_quantize(
    weight: torch.Tensor, spec: QuantSpec | str, *, scale: str = "absmax", scale_dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """Return ``quantize(...).dequantize(torch.float32)`` of the same arguments bit for bit, without packing."""
    spec = QuantSpec.of(spec)
    if spec.corrected:
        return quantize(weight, spec, scale=scale, scale_dtype=scale_dtype).dequantize(torch.float32)
    _check(weight, scale, scale_dtype)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows, columns, _, tile in _rounded_tiles(weight, spec, scale, scale_dtype):
        out[rows, columns] = spec.format.restore(tile).flatten(1)
    return out


def _corrected(weight: torch.Tensor, spec: QuantSpec, scale: str, scale_dtype: torch.dtype) -> QuantizedTensor:
    """Quantize a weight matrix, then what is left of the rows with the largest squared error."""
    base = quantize(weight, spec.base, scale=scale, scale_dtype=scale_dtype)
    error = weight.detach().float() - base.dequantize(torch.float32)
    rows = corrected_rows(error.square().sum(-1), spec)
    return QuantizedTensor.corrected(base, rows, quantize(error[rows], spec.base, scale=scale, scale_dtype=scale_dtype))


def corrected_rows(cost: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the rows that a spec corrects, int64 [R], in rising order: those that it names, or of largest cost [N].

    Raises:
        InvalidInputError: there are fewer.
    """
    if why := spec.why_unfit(len(cost)):
        raise InvalidInputError(why)
    if (first := spec.first_corrected) >= 0:
        return torch.arange(first, first + spec.corrected, device=cost.device)
    return cost.topk(spec.corrected).indices.sort().values


def _rounded_tiles(
    weight: torch.Tensor, spec: QuantSpec, scale: str, scale_dtype: torch.dtype
) -> Iterator[tuple[slice, slice, slice, Rounded]]:
    """Yield (rows, columns, groups) and the rounded values of each tile; a ragged last group gets its own tiles."""
    n, k = weight.shape
    length = spec.group_length(k)
    whole = k // length
    parts = [(slice(0, whole * length), slice(0, whole), length)]
    if k % length:
        parts.append((slice(whole * length, k), slice(whole, whole + 1), k % length))
    step = max(1, _TILE // k) if weight.device.type == "cpu" else n
    ratios = [1.0] if scale == "absmax" else _CLIP_RATIOS
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        for columns, groups, part_length in parts:
            tile = weight.detach()[rows, columns].float().unflatten(1, (-1, part_length))
            rounded = spec.format.round(tile, spec, ratios, scale_dtype)
            if not torch.isfinite(rounded.scale).all():  # a NaN or infinity of the weight reaches its scale
                raise InvalidInputError(_why_not_finite(weight, scale_dtype))
            yield rows, columns, groups, rounded


def _why_not_finite(weight: torch.Tensor, scale_dtype: torch.dtype) -> str:
    if not torch.isfinite(weight).all():
        return "the weight holds a NaN or an infinity; repair the checkpoint before quantizing it"
    return f"a scale does not fit {scale_dtype}; pass scale_dtype=torch.bfloat16 or torch.float32"


def _check(weight: torch.Tensor, scale: str, scale_dtype: torch.dtype) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise InvalidInputError(
            f"quantize takes a matrix [N, K] with N and K at least 1, got shape {list(weight.shape)}"
        )
    if weight.dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"quantize takes {FLOAT_NAMES} weights, got {weight.dtype}")
    if scale not in SCALES:
        raise InvalidInputError(f'scale must be "absmax" or "mse", got {scale!r}')
    if scale_dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"scale_dtype must be {FLOAT_NAMES}, got {scale_dtype}")
