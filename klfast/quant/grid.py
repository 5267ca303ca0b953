"""Rounding of groups of numbers to a uniform grid, with the scale rounded to its storage dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# q float32 [N, G, L]; scale [N, G, 1]; zero point float32 [N, G, 1], None if symmetric
GridRounded = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def round_to_grid(
    groups: torch.Tensor, q_range: tuple[int, int], symmetric: bool, ratios: Sequence[float], scale_dtype: torch.dtype
) -> GridRounded:
    """Round float32 [N, G, L] to nearest, half to even.

    Args:
        groups: the numbers; a NaN or infinity reaches its group's scale.
        q_range: the smallest and the largest integer.
        symmetric: True maps the largest magnitude to the largest integer, False the range to ``q_range``.
        ratios: candidate fractions of a group's range to span; the least squared error wins, the first on ties.
        scale_dtype: of the scales.
    """
    if symmetric:
        low, span = None, groups.abs().amax(-1, keepdim=True)
    else:  # the range includes 0, so that 0 is exact and the zero point is on the grid
        low = groups.amin(-1, keepdim=True).clamp_(max=0)
        span = groups.amax(-1, keepdim=True).clamp_(min=0) - low
    if len(ratios) == 1:
        return _round(groups, low, span, ratios[0], q_range, scale_dtype)
    least = torch.full_like(span, torch.inf)
    best = torch.full_like(span, ratios[0])
    for ratio in ratios:
        q, s, z = _round(groups, low, span, ratio, q_range, scale_dtype)
        q = q if z is None else q.sub_(z)
        error = q.mul_(s.float()).sub_(groups).square_().sum(-1, keepdim=True)
        best.masked_fill_(error < least, ratio)
        least = torch.minimum(error, least)
    return _round(groups, low, span, best, q_range, scale_dtype)


def _round(
    groups: torch.Tensor,
    low: torch.Tensor | None,
    span: torch.Tensor,
    ratio: float | torch.Tensor,
    q_range: tuple[int, int],
    scale_dtype: torch.dtype,
) -> GridRounded:
    """Round groups to the grid of ``span * ratio``; ``low``, the range's lower end, only if asymmetric."""
    q_min, q_max = q_range
    tiny = max(torch.finfo(scale_dtype).smallest_normal * torch.finfo(scale_dtype).eps, 1e-30)  # float16: a subnormal
    steps = q_max if low is None else q_max - q_min
    s = _stored_scale(span * ratio, steps, 0.5 if low is None else 0.0, tiny, scale_dtype)
    q = groups / s.float()
    if low is None:
        return q.round_().clamp_(q_min, q_max), s, None
    z = (q_min - low * ratio / s.float()).round_().clamp_(q_min, q_max)
    return q.add_(z).round_().clamp_(q_min, q_max), s, z


def _stored_scale(span: torch.Tensor, steps: int, slack: float, tiny: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the stored scale that spans ``span`` in ``steps``; at least ``tiny``, so that it can divide a zero group.

    Rounded to nearest, except that float16's subnormals are so far apart that many of the largest weights would be
    clipped. There it is rounded up where ``steps + slack`` steps would not reach: a symmetric grid has half a step to
    spare at its end, an asymmetric one loses that to the rounding of its zero point.
    """
    s = (span / steps).clamp_(min=tiny).to(dtype)
    if dtype is not torch.float16:
        return s
    wide, bits = s.float(), s.view(torch.int16)
    short = (wide < torch.finfo(dtype).smallest_normal) & (wide * (steps + slack) < span)
    return (bits + short).view(dtype)
