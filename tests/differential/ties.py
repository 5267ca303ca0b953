"""Ties between vocabulary entries: which of them rounding may make a model's most likely one."""

from __future__ import annotations

import torch
from calls import Call

from klfast import QuantizedTensor


def agreement_is_possible(found: torch.Tensor, call: Call, rounding: float) -> torch.Tensor:
    """Return where the agreement of a ``linear_divergence`` that was found is a possible one, bool [S * T].

    Args:
        found: both models have the same most likely entry, bool [S * T].
        call: what found it.
        rounding: of a product and of each addition, relative to the operands' sizes.
    """
    teacher, student = (
        _possible(call.arguments[f"{who}_hidden"], call.arguments[f"{who}_head"], rounding)
        for who in ("teacher", "student")
    )
    teacher = teacher.repeat(len(student) // len(teacher), 1)
    return torch.where(found, (teacher & student).any(-1), (teacher | student).sum(-1) > 1)


def _possible(hidden: torch.Tensor, head: torch.Tensor | QuantizedTensor, rounding: float) -> torch.Tensor:
    """Return which entries may have the largest logit, bool [T, V], for hidden states [..., T, H] and a head [V, H]."""
    hidden = hidden.double().flatten(0, -2)
    rows, sizes = _rows(head)
    logits, error = hidden @ rows.T, rounding * (hidden.abs() @ sizes.T)
    return logits + error >= (logits - error).amax(-1, keepdim=True)


def _rows(head: torch.Tensor | QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a head's weights and the sizes of what is multiplied, codes and zero points apart, float64 [V, H]."""
    if isinstance(head, torch.Tensor):
        return head.double(), head.double().abs()
    rows = head.dequantize(torch.float32).double()
    return rows, rows.abs() + float(head.scale.abs().max()) * 2**head.spec.bits
