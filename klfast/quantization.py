"""Rounding a float matrix to a QuantizedTensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from klfast import reference
from klfast.errors import InvalidInputError
from klfast.types import FLOAT_DTYPES, QuantizedTensor, QuantSpec

_CLIP_RATIOS = torch.linspace(1.0, 0.5, 26).tolist()


def quantize(weight: torch.Tensor, spec: QuantSpec, *, scale: str = "absmax", scale_dtype: torch.dtype = torch.float16) -> QuantizedTensor:
    """Quantize a weight matrix, round to nearest.

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.
        spec: bits, group and symmetry.
        scale: "absmax" (the largest magnitude, or the range min..max if asymmetric, maps to the end of the grid) or
            "mse" (that range shrunk by the ratio, of 26 from 1 to 0.5, with the least squared error per group).
        scale_dtype: what scales are stored as. Values are rounded with the stored scale, so its rounding costs
            next to nothing.

    Raises:
        InvalidInputError: wrong dtype or shape, a NaN or infinity, or a scale beyond ``scale_dtype``'s range.
    """
    _check(weight, scale, scale_dtype)
    n, k = weight.shape
    length = spec.group_length(k)
    ragged = -k % length if k else 0
    # [N, G, length]; the padding repeats the last column, so that it changes no group's range.
    if weight.numel():
        groups = F.pad(weight.detach().float().unsqueeze(0), (0, ragged), mode="replicate").view(n, -1, length)
    else:
        groups = weight.new_zeros(n, spec.n_groups(k), max(length, 1), dtype=torch.float32)
    ratios = [1.0] if scale == "absmax" else _CLIP_RATIOS
    best = None
    for ratio in ratios:
        trial = _round(groups, spec, ratio, scale_dtype)
        q, s, z = trial
        error = ((q - z) * s.float() - groups).square().sum(-1, keepdim=True)
        if best is None:
            best, least = trial, error
        else:
            better = error < least
            best = tuple(torch.where(better, new, old) for new, old in zip(trial, best, strict=True))
            least = torch.where(better, error, least)
    q, s, z = best
    if not torch.isfinite(s).all():
        raise InvalidInputError(f"a scale does not fit {scale_dtype}; pass scale_dtype=torch.bfloat16 or torch.float32")
    packed = reference.pack(q.flatten(1)[:, :k].to(torch.int8), spec.bits)
    zero_point = None if spec.symmetric else reference.pack(z.squeeze(-1).T.to(torch.int8), spec.bits).T.contiguous()
    return QuantizedTensor(packed, s.squeeze(-1).contiguous(), zero_point, (n, k), spec)


def _round(groups: torch.Tensor, spec: QuantSpec, ratio: float, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, scale, zero point) of [N, G, length] with the range shrunk by ``ratio``; scale and zero point [N, G, 1]."""
    if spec.symmetric:
        span, steps = groups.abs().amax(-1, keepdim=True) * ratio, spec.q_max
    else:  # the range takes in 0, so that 0 is exact and the zero point is on the grid
        low = groups.amin(-1, keepdim=True).clamp(max=0) * ratio
        span, steps = groups.amax(-1, keepdim=True).clamp(min=0) * ratio - low, spec.q_max - spec.q_min
    tiny = max(torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps, 1e-30)  # float16: a subnormal
    s = (span / steps).clamp(min=tiny).to(scale_dtype)  # an all-zero group keeps a scale that divides
    z = torch.zeros_like(s, dtype=torch.float32) if spec.symmetric else (spec.q_min - low / s.float()).round().clamp(spec.q_min, spec.q_max)
    q = (groups / s.float() + z).round().clamp(spec.q_min, spec.q_max)
    return q, s, z


def _check(weight: torch.Tensor, scale: str, scale_dtype: torch.dtype) -> None:
    if weight.dim() != 2:
        raise InvalidInputError(f"quantize takes a matrix [N, K], got shape {list(weight.shape)}")
    if weight.dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"quantize takes float32, bfloat16 or float16 weights, got {weight.dtype}")
    if scale not in ("absmax", "mse"):
        raise InvalidInputError(f'scale must be "absmax" or "mse", got {scale!r}')
    if scale_dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"scale_dtype must be float32, bfloat16 or float16, got {scale_dtype}")
    if not torch.isfinite(weight).all():
        raise InvalidInputError("the weight holds a NaN or an infinity; repair the checkpoint before quantizing it")
