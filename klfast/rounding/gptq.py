"""GPTQ: input features are rounded one after another, each making up for the errors of those before it."""

from __future__ import annotations

import torch

from klfast.rounding.grids import Grid
from klfast.rounding.objective import Objective

BLOCK = 64  # features whose effect on the others is computed at once


def gptq(target: torch.Tensor, objective: Objective, grid: Grid) -> torch.Tensor:
    """Round a matrix [K, N] to a grid; return the codes.

    The features come in the order of falling mean square ("activation order"); their groups stay where they are stored,
    and so do the scales. Each is rounded to the value nearest to the one that makes its term of the objective 0, given
    the errors of the features before it. That is GPTQ without its inverse Hessian (Frantar et al., arXiv 2210.17323;
    Chee et al., arXiv 2307.13304, theorem 6, show that both are one).
    """
    codes, errors = torch.empty_like(target), torch.empty_like(target)  # the errors in the order of rounding
    features, feedback = objective.order.tolist(), objective.feedback
    for start in range(0, len(target), BLOCK):
        end = min(start + BLOCK, len(target))
        wanted = target[objective.order[start:end]] + feedback[:start, start:end].T @ errors[:start]
        for place, feature in enumerate(features[start:end], start):
            value = torch.addmv(wanted[place - start], errors[start:place].T, feedback[start:place, place])
            group = feature // grid.length
            code = grid.codes(value, group)
            codes[feature] = code
            torch.addcmul(target[feature], code, grid.step[group], value=-1, out=errors[place])
    return codes
