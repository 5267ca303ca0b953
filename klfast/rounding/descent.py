"""Coordinate descent from a rounded matrix: scales and codes in turn, each to its best value given all others."""

from __future__ import annotations

from dataclasses import replace

import torch

from klfast.rounding.gptq import BLOCK
from klfast.rounding.grids import Grid, stored
from klfast.rounding.objective import Objective


def descend(
    target: torch.Tensor, objective: Objective, codes: torch.Tensor, grid: Grid, rounds: int, dtype: torch.dtype
) -> tuple[torch.Tensor, Grid]:
    """Return codes and a grid with a smaller objective, or an equal one.

    Args:
        target: float32 [K, N].
        objective: to make smaller.
        codes: float32 [K, N], to start from.
        grid: theirs.
        rounds: over all groups.
        dtype: of the stored scales.
    """
    codes, grid, hessian = codes.clone(), replace(grid, step=grid.step.clone()), objective.hessian
    slope = hessian @ (target - grid.values(codes))  # minus half the gradient by the values
    panel = grid.length * max(1, BLOCK // grid.length)
    for _ in range(rounds):
        for start in range(0, len(codes), panel):
            members = slice(start, min(start + panel, len(codes)))
            own, group = hessian[members, members], start // grid.length
            moved = _descend_panel(codes[members], slope[members].clone(), own, grid, group, dtype)
            slope.addmm_(hessian[:, members], moved, alpha=-1)
    return codes, grid


def _descend_panel(
    codes: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, grid: Grid, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """Move scales and codes of whole groups, from ``group`` on, in place; return how the values move.

    Codes and slope are [k, N], the Hessian [k, k], of the k features of these groups; the slope is overwritten.
    """
    moved = torch.zeros_like(slope)

    def move(features: slice, by: torch.Tensor) -> None:
        moved[features] += by
        slope.addmm_(hessian[:, features], by, alpha=-1)

    for first in range(0, len(codes), grid.length):
        of_group = slice(first, min(first + grid.length, len(codes)))
        own = hessian[of_group, of_group]
        move(of_group, _refit_scale(codes[of_group], slope[of_group], own, grid, group, dtype))
        for start in range(first, of_group.stop, BLOCK):
            block = slice(start, min(start + BLOCK, of_group.stop))
            move(block, _move_codes(codes[block], slope[block], hessian[block, block], grid, group))
        group += 1
    return moved


def _refit_scale(
    codes: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, grid: Grid, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """Give a group, in each row, the scale that is best for its codes; return how its values move."""
    pull, curvature = (codes * slope).sum(0), (codes * (hessian @ codes)).sum(0)
    step = grid.step[group]
    fit = stored(step + pull / curvature, dtype)
    moved = fit - step
    gain = 2 * moved * pull - moved.square() * curvature
    moved = torch.where(gain > 0, moved, 0)  # all codes 0: a NaN, which compares as no gain
    grid.step[group] = torch.where(gain > 0, fit, step)
    return codes * moved


def _move_codes(
    codes: torch.Tensor, slope: torch.Tensor, hessian: torch.Tensor, grid: Grid, group: int
) -> torch.Tensor:
    """Move each code of a block of a group, in turn and in place; return how the values move."""
    step, low, high = grid.step[group], grid.low[group], grid.high[group]
    pulls, moved = slope / step, torch.empty_like(slope)  # in steps, as the codes are
    each = zip(hessian.diagonal().tolist(), codes.unbind(), pulls.unbind(), moved.unbind(), strict=True)
    for i, (curvature, code, pull, by) in enumerate(each):
        left = torch.addmv(pull, moved[:i].T, hessian[i, :i], alpha=-1)
        best = torch.add(code, left, alpha=1 / curvature).round_().clamp_(low, high)
        torch.sub(best, code, out=by)
    codes += moved
    return moved.mul_(step)
