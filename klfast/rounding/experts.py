"""What enters the matrices of a mixture's experts, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from klfast.models.matrices import Matrix
from klfast.nn.experts import QuantExperts, activated, stack_names
from klfast.rounding.moments import Moments
from klfast.rounding.watching import Routed


def expert_moments(stack: Matrix, expert: int, batches: Sequence[tuple[Routed, Routed]]) -> Moments:
    """Return the moments of one expert's inputs, over the tokens that are routed to it in the partly rounded model.

    The full-precision model's inputs are those of the same tokens, whichever experts they meet there. What enters an
    expert's last matrix is computed from its first in full precision, or as the model has it if that is quantized.

    Args:
        stack: in full precision, or the expert's matrix in it.
        expert: its number.
        batches: what enters the experts in the partly rounded and in the full-precision model, for each batch.
    """
    holder: Any = stack.holder
    moments = Moments(stack.shape[1], stack.tensor.device)
    for student, teacher in batches:
        rows = (student.experts == expert).any(-1)
        y, x = student.hidden[rows], teacher.hidden[rows]
        if stack.attribute != _first(holder):
            y, x = (activated(holder, _through_first(holder, expert, inputs)) for inputs in (y, x))
        moments.add(y, x)
    return moments


def _through_first(holder: Any, expert: int, inputs: torch.Tensor) -> torch.Tensor:
    """Return what leaves an expert's first matrix, [T, N], of inputs [T, K]."""
    if isinstance(holder, QuantExperts):
        index = torch.full((len(inputs), 1), expert, device=inputs.device)
        return holder.product(_first(holder), inputs, index).squeeze(1)
    first: torch.Tensor = getattr(holder, _first(holder))[expert]
    return inputs @ first.T


def _first(holder: nn.Module) -> str:
    return stack_names(holder)[0]
