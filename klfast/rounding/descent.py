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
    for _ in range(rounds):
        slope = hessian @ (target - grid.values(codes))  # minus half the gradient by the values
        for group in range(len(grid.step)):
            end = min((group + 1) * grid.length, len(codes))
            members = slice(group * grid.length, end)
            moved = _refit_scale(codes[members], slope[members], hessian[members, members], grid, group, dtype)
            slope.addmm_(hessian[:, members], moved, alpha=-1)
            for start in range(members.start, end, BLOCK):
                block = slice(start, min(start + BLOCK, end))
                moved = _move_codes(codes[block], slope[block], hessian[block, block], grid, group)
                slope.addmm_(hessian[:, block], moved, alpha=-1)
    return codes, grid


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
    step, moved = grid.step[group], torch.zeros_like(slope)
    for i, curvature in enumerate(hessian.diagonal().tolist()):
        pull = slope[i] - hessian[i, :i] @ moved[:i]
        best = grid.codes(codes[i] * step + pull / curvature, group)
        moved[i] = (best - codes[i]) * step
        codes[i] = best
    return moved
