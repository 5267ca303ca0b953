"""Grids: the values that the weights of each group may take, chosen by a weighted squared error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from klfast.quant.grid import round_to_grid
from klfast.quant.spec import QuantSpec

_WIDEST, _RATIOS = 1.05, 20  # of the range that a grid spans; its narrowest follows from the bits
_REFITS = 2
_TILE = 1 << 17  # weights that are searched together: few enough for the caches


@dataclass(frozen=True, eq=False)
class Grid:
    """The values ``code * step`` with whole codes, ``low <= code <= high``, for each group of a transposed matrix.

    Attributes:
        step: float32 [G, N], the scales, exact in the dtype that stores them; of either sign if the spec is symmetric.
        low: float32 [G, N], the smallest code; a zero point is q_min - low.
        high: float32 [G, N], the largest one.
        length: features in a group, of which the last may be shorter.
    """

    step: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    length: int

    @classmethod
    def of(cls, step: torch.Tensor, zero: torch.Tensor, spec: QuantSpec, length: int) -> Grid:
        """Return the grid of scales and zero points, float32 [G, N]."""
        return cls(step, spec.q_min - zero, spec.q_max - zero, length)

    def codes(self, values: torch.Tensor, group: int) -> torch.Tensor:
        """Return the codes nearest to values [..., N] of a group's features."""
        return (values / self.step[group]).round_().clamp_(self.low[group], self.high[group])

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the codes nearest to a matrix [K, N]."""
        groups = enumerate(matrix.split(self.length))
        return torch.cat([self.codes(rows, group) for group, rows in groups])

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the matrix [K, N] that codes stand for."""
        return codes * self.by_feature(self.step, len(codes))

    def by_feature(self, each: torch.Tensor, k: int) -> torch.Tensor:
        """Return a row for each of K features, [K, N], of rows for each group, [G, N]."""
        return each.repeat_interleave(self.length, 0)[:k]

    def where(self, chosen: torch.Tensor, other: Grid) -> Grid:
        """Return this grid in the columns where ``chosen``, bool [N], and ``other`` in the rest."""
        step = torch.where(chosen, self.step, other.step)
        low, high = torch.where(chosen, self.low, other.low), torch.where(chosen, self.high, other.high)
        return Grid(step, low, high, self.length)


def stored(step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scales as ``dtype`` stores them, in float32; never 0, so that they can divide."""
    info = torch.finfo(dtype)
    least = max(info.smallest_normal * info.eps, 1e-30)  # float16: a subnormal
    return torch.copysign(step.abs().clamp(min=least).to(dtype).float(), step)


def absmax(matrix: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> Grid:
    """Return the grid of ``klfast.quantize(scale="absmax")``.

    Args:
        matrix: float32 [K, N].
        spec: of integers.
        dtype: of the scales.
    """
    length = spec.group_length(len(matrix))
    groups = _grouped(matrix, length).permute(2, 0, 1)
    _, scale, zero = round_to_grid(groups, (spec.q_min, spec.q_max), spec.symmetric, [1.0], dtype)
    step = scale.squeeze(-1).T.float().contiguous()
    return Grid.of(step, torch.zeros_like(step) if zero is None else zero.squeeze(-1).T.contiguous(), spec, length)


def search(matrix: torch.Tensor, importance: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> Grid:
    """Return the grid with the least weighted squared error to nearest among many, its scales refitted to their codes.

    A symmetric scale may be negative: then the weight of largest magnitude can fall on q_min, beyond q_max, whatever
    its sign. A refit takes the scale with the least error for the codes as they are.

    Args:
        matrix: float32 [K, N].
        importance: float32 [K], weights of the squared error: the mean square of each input feature.
        spec: of integers.
        dtype: of the scales.
    """
    length = spec.group_length(len(matrix))
    columns = matrix.split(max(1, _TILE // len(matrix)), 1)
    found = [_search(some.contiguous(), importance, spec, dtype, length) for some in columns]
    step, zero = (torch.cat(each, 1) for each in zip(*found, strict=True))
    return Grid.of(step, zero, spec, length)


def _search(
    matrix: torch.Tensor, importance: torch.Tensor, spec: QuantSpec, dtype: torch.dtype, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scales and zero points, float32 [G, N]."""
    groups, weights = _grouped(matrix, length), _grouped(importance[:, None], length)
    best = absmax(matrix, spec, dtype)
    step, zero = best.step, spec.q_min - best.low
    least = _error(groups, weights, _codes(groups, step, zero, spec), step)

    def keep_better(other: torch.Tensor, its_zero: torch.Tensor) -> None:
        nonlocal step, zero, least
        error = _error(groups, weights, _codes(groups, other, its_zero, spec), other)
        better = error < least
        step, zero = torch.where(better, other, step), torch.where(better, its_zero, zero)
        least = torch.where(better, error, least)

    for candidate, its_zero in _candidates(groups, spec, dtype):
        keep_better(candidate, its_zero)
    for _ in range(_REFITS):
        codes = _codes(groups, step, zero, spec)
        fit = (codes * groups * weights).sum(1) / (codes.square() * weights).sum(1)
        keep_better(stored(fit, dtype), zero)
    return step, zero


def _candidates(
    groups: torch.Tensor, spec: QuantSpec, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scales and zero points, [G, N]."""
    ratios = torch.linspace(_WIDEST, 1 - 2 / spec.bits, _RATIOS).tolist()
    top, bottom = groups.amax(1), groups.amin(1)
    if spec.symmetric:
        extreme, zero = torch.where(top >= -bottom, top, bottom), torch.zeros_like(top)
        for ratio in ratios:
            for end in (spec.q_min, spec.q_max):
                yield stored(extreme * (ratio / end), dtype), zero
        return
    low = bottom.clamp(max=0)
    span = top.clamp(min=0) - low
    for ratio in ratios:
        step = stored(span * (ratio / (spec.q_max - spec.q_min)), dtype)
        zero = (spec.q_min - low * ratio / step).round_().clamp_(spec.q_min, spec.q_max)
        yield step, zero


def _codes(groups: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    codes = (groups / step[:, None]).round_()
    return codes.clamp_((spec.q_min - zero)[:, None], (spec.q_max - zero)[:, None])


def _error(groups: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Return the weighted squared error of each group, [G, N]; overwrites the codes."""
    return codes.mul_(step[:, None]).sub_(groups).square_().mul_(weights).sum(1)


def _grouped(matrix: torch.Tensor, length: int) -> torch.Tensor:
    """Return [K, N] as [G, length, N]; zeros, which change no range and no error, fill the last group."""
    filled: torch.Tensor = F.pad(matrix, (0, 0, 0, -len(matrix) % length))
    return filled.view(-1, length, matrix.shape[1])
