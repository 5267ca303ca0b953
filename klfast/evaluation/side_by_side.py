"""Two models side by side on the same text: a few rows at a time, never with full logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import deferred, interruptible
from klfast.core.progress import Progress, reporter
from klfast.models.adapters import unwrapped
from klfast.models.batches import Batches, is_single, read
from klfast.models.calling import evaluation_mode, last_hidden
from klfast.models.head import Head, divergence, find_head, linear_head

METRICS = ("nll", "teacher_nll", "kl", "kl_student_teacher", "jsd", "top1")
Take = Callable[[torch.Tensor, torch.Tensor], None]
_MOST_TOKENS = 8192  # computed at once if the caller made no batches


@torch.no_grad()
def measure(
    model: nn.Module, teacher: nn.Module | None, batches: Batches, take: Take, progress: Progress, what: str
) -> None:
    """Give ``take`` the ids of some rows, int64 [B, T], and the METRICS of their tokens, float64 [6, B, T - 1].

    Column t is the prediction of token t + 1 from the t + 1 tokens before it. Without a teacher the model is its own.

    Args:
        model: the student.
        teacher: a model with the same vocabulary, on the same device.
        batches: as for ``klfast.evaluate``. All rows in one tensor are computed a few at a time.
        take: called for each batch, in order.
        progress: as for ``klfast.evaluate``.
        what: the word before the bar.

    Raises:
        InvalidInputError: as ``klfast.evaluate``.
    """
    model, teacher = unwrapped(model), None if teacher is None else unwrapped(teacher)
    vocabulary = linear_head(model).out_features
    teacher_vocabulary = vocabulary if teacher is None else linear_head(teacher).out_features
    if teacher_vocabulary != vocabulary:
        raise InvalidInputError(
            f"the teacher has {teacher_vocabulary} tokens, the model {vocabulary}; give models with one vocabulary"
        )
    most = _MOST_TOKENS if is_single(batches) else None
    parts = [ids for batch in read(batches, vocabulary) for ids in batch.equal_lengths(most)]
    with (
        deferred(),
        evaluation_mode(model),
        evaluation_mode(model if teacher is None else teacher),
        reporter(progress, what, len(parts)) as advance,
    ):
        head = _verified_head(model, parts[0][:1, :8])
        teacher_head = head if teacher is None else _verified_head(teacher, parts[0][:1, :8])
        readout = head.readout()
        teacher_readout = readout if teacher is None else teacher_head.readout()
        for ids in parts:
            with interruptible():
                hidden = head_inputs(model, head, ids[:, :-1])
                teacher_hidden = hidden if teacher is None else head_inputs(teacher, teacher_head, ids[:, :-1])
                targets = ids[:, 1:].to(hidden.device)
                found = divergence(teacher_hidden, teacher_readout, hidden, readout, targets)
            assert found.ce_student is not None and found.ce_teacher is not None  # there are targets
            metrics = (
                found.ce_student,
                found.ce_teacher,
                found.kl_teacher_student,
                found.kl_student_teacher,
                found.jsd,
                found.top1_agree,
            )
            # On the CPU, since some GPUs have no float64.
            take(ids, torch.stack(metrics).cpu().double().view(len(METRICS), len(ids), -1))
            advance(1, "")


def head_inputs(model: nn.Module, head: Head, ids: torch.Tensor) -> torch.Tensor:
    """Return the operand of the head's weight, [B, T, H], for int64 [B, T]."""
    return head.inputs(last_hidden(model, ids.to(head.device)))


def _verified_head(model: nn.Module, ids: torch.Tensor) -> Head:
    head, logits = find_head(model, ids)
    require_finite(logits.isfinite().all())
    return head


def require_finite(finite: object) -> None:
    """Raise InvalidInputError, which blames the model's logits, unless ``finite`` is true."""
    if not finite:
        raise InvalidInputError("the model's logits hold a NaN or an infinity; its weights are damaged")
