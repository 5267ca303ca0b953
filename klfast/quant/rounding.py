"""Rounding a float matrix to a QuantizedTensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from klfast.core.dtypes import FLOAT_DTYPES
from klfast.core.errors import InvalidInputError
from klfast.quant import packing
from klfast.quant.types import QuantizedTensor, QuantSpec

_CLIP_RATIOS = torch.linspace(1.0, 0.5, 26).tolist()
_TILE = 1 << 18  # weights rounded at a time on a CPU: the passes over them stay in cache


def quantize(
    weight: torch.Tensor, spec: QuantSpec | str, *, scale: str = "absmax", scale_dtype: torch.dtype = torch.float16
) -> QuantizedTensor:
    """Quantize a weight matrix, round to nearest (half to even).

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite, with at least one row and column.
        spec: bits, group and symmetry; or its text, such as "int4-g64-sym".
        scale: "absmax" (the largest magnitude maps to q_max; if asymmetric, the range min..max, extended to take in
            0, maps to q_min..q_max) or "mse" (that range shrunk by the ratio, of 26 from 1 to 0.5, with the least
            squared error per group).
        scale_dtype: what scales are stored as. Values are rounded with the stored scale, so its rounding costs
            next to nothing. Below 6e-5 those of float16 get coarse and are rounded up, so that no weight is clipped;
            the smallest is 6e-8, so weights below 3e-8 become 0. Pass bfloat16 for matrices that consist of such.

    Raises:
        InvalidInputError: wrong dtype or shape, a NaN or infinity, or a scale beyond ``scale_dtype``'s range.
    """
    spec = QuantSpec.of(spec)
    _check(weight, scale, scale_dtype)
    n, k = weight.shape
    n_groups = spec.n_groups(k)
    q = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    s = torch.empty(n, n_groups, dtype=scale_dtype, device=weight.device)
    z = None if spec.symmetric else torch.empty(n, n_groups, dtype=torch.int8, device=weight.device)
    for rows, columns, groups, (tile_q, tile_s, tile_z) in _rounded_tiles(weight, spec, scale, scale_dtype):
        q[rows, columns] = tile_q.flatten(1)
        s[rows, groups] = tile_s.squeeze(-1)
        if z is not None:
            z[rows, groups] = tile_z.squeeze(-1)
    zero_point = None if z is None else packing.pack(z.T, spec.bits).T.contiguous()
    return QuantizedTensor(packing.pack(q, spec.bits), s, zero_point, (n, k), spec)


def fake_quantize(
    weight: torch.Tensor, spec: QuantSpec | str, *, scale: str = "absmax", scale_dtype: torch.dtype = torch.float16
) -> torch.Tensor:
    """float32 [N, K], bit for bit ``quantize(...).dequantize(torch.float32)`` with the same arguments, nothing packed."""
    spec = QuantSpec.of(spec)
    _check(weight, scale, scale_dtype)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    for rows, columns, _, (q, s, z) in _rounded_tiles(weight, spec, scale, scale_dtype):
        out[rows, columns] = q.sub_(z).mul_(s.float()).flatten(1)
    return out


_Rounded = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor | float
]  # q float32 [N, G, L]; scale and zero point [N, G, 1]


def _rounded_tiles(
    weight: torch.Tensor, spec: QuantSpec, scale: str, scale_dtype: torch.dtype
) -> Iterator[tuple[slice, slice, slice, _Rounded]]:
    """(rows, columns, groups) of each tile with its rounded values; a ragged last group makes tiles of its own."""
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
            rounded = _round_best(tile, spec, ratios, scale_dtype)
            if not torch.isfinite(rounded[1]).all():  # a NaN or infinity of the weight reaches its scale
                raise InvalidInputError(_why_not_finite(weight, scale_dtype))
            yield rows, columns, groups, rounded


def _round_best(groups: torch.Tensor, spec: QuantSpec, ratios: list[float], scale_dtype: torch.dtype) -> _Rounded:
    """float32 [N, G, L] rounded with, for each group, the ratio of the least squared error (the first among equals)."""
    if spec.symmetric:
        low, span = None, groups.abs().amax(-1, keepdim=True)
    else:  # the range takes in 0, so that 0 is exact and the zero point is on the grid
        low = groups.amin(-1, keepdim=True).clamp_(max=0)
        span = groups.amax(-1, keepdim=True).clamp_(min=0) - low
    if len(ratios) == 1:
        return _round(groups, low, span, ratios[0], spec, scale_dtype)
    least = torch.full_like(span, torch.inf)
    best = torch.full_like(span, ratios[0])
    for ratio in ratios:
        q, s, z = _round(groups, low, span, ratio, spec, scale_dtype)
        error = q.sub_(z).mul_(s.float()).sub_(groups).square_().sum(-1, keepdim=True)
        best.masked_fill_(error < least, ratio)
        least = torch.minimum(error, least)
    return _round(groups, low, span, best, spec, scale_dtype)


def _round(
    groups: torch.Tensor,
    low: torch.Tensor | None,
    span: torch.Tensor,
    ratio: float | torch.Tensor,
    spec: QuantSpec,
    scale_dtype: torch.dtype,
) -> _Rounded:
    """Groups rounded on the grid of ``span * ratio``; ``low``, the range's lower end, only if asymmetric."""
    tiny = max(torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps, 1e-30)  # float16: a subnormal
    steps = spec.q_max if spec.symmetric else spec.q_max - spec.q_min
    s = _stored(span * ratio, steps, 0.5 if low is None else 0.0, tiny, scale_dtype)
    q = groups / s.float()
    if low is None:
        return q.round_().clamp_(spec.q_min, spec.q_max), s, 0.0
    z = (spec.q_min - low * ratio / s.float()).round_().clamp_(spec.q_min, spec.q_max)
    return q.add_(z).round_().clamp_(spec.q_min, spec.q_max), s, z


def _stored(span: torch.Tensor, steps: int, slack: float, tiny: float, dtype: torch.dtype) -> torch.Tensor:
    """The scale, as it is stored, that spans ``span`` in so many steps; at least ``tiny``, so that an all-zero group has one that divides.

    Rounded to nearest; but float16's subnormals lie so far apart that many of the largest weights would be clipped.
    There it is rounded up where ``steps + slack`` steps would not reach: a symmetric grid has half a step to spare at
    its end, an asymmetric one loses that to the rounding of its zero point.
    """
    s = (span / steps).clamp_(min=tiny).to(dtype)
    if dtype is not torch.float16:
        return s
    wide, bits = s.float(), s.view(torch.int16)
    short = (wide < torch.finfo(dtype).smallest_normal) & (wide * (steps + slack) < span)
    return (bits + short).view(dtype)


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
        raise InvalidInputError(f"quantize takes float32, bfloat16 or float16 weights, got {weight.dtype}")
    if scale not in ("absmax", "mse"):
        raise InvalidInputError(f'scale must be "absmax" or "mse", got {scale!r}')
    if scale_dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"scale_dtype must be float32, bfloat16 or float16, got {scale_dtype}")
