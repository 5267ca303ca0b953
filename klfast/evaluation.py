"""Quality of a model on a text, and its divergence from a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import deferred, interruptible
from klfast.core.progress import Progress, reporter
from klfast.core.window_stats import WindowStats
from klfast.models.adapters import refuse_wrapper
from klfast.models.batches import Batches, is_single, read
from klfast.models.calling import evaluation_mode, last_hidden
from klfast.models.head import Head, divergence, find_head, linear_head

_MOST_TOKENS = 8192  # computed at once if the caller made no batches
_MEASURED = ("nll", "teacher_nll", "kl", "kl_student_teacher", "jsd", "top1")


@dataclass(frozen=True)
class Evaluation:
    """Result of ``evaluate``: means over all predicted tokens, in nats unless stated otherwise.

    Attributes:
        tokens: predicted tokens, T - 1 of each row.
        perplexity: exp(nll).
        nll: negative log-likelihood of the text's own next token.
        bits_per_token: nll / log 2.
        kl: KL(teacher || model) of the next-token distributions.
        kl_stderr: its standard error, computed from means over rows (as in a sweep), since the tokens of a row are
            correlated; NaN with a single row.
        kl_student_teacher: KL(model || teacher).
        jsd: Jensen-Shannon divergence.
        top1_agreement: share of the tokens for which both have the same most likely next token.
        teacher_perplexity: as perplexity.

    Without a teacher, the comparisons with it are None.
    """

    tokens: int
    perplexity: float
    nll: float
    bits_per_token: float
    kl: float | None = None
    kl_stderr: float | None = None
    kl_student_teacher: float | None = None
    jsd: float | None = None
    top1_agreement: float | None = None
    teacher_perplexity: float | None = None


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, teacher: nn.Module | None = None, progress: Progress = False
) -> Evaluation:
    """Measure the perplexity of ``model`` on token batches and, with a teacher, the divergence from it.

    Each row is a separate text: its first token has no context and is not predicted. Full logits are never made:
    memory scales with a batch's hidden states, [B, T, H].

    Args:
        model: a causal language model (transformers), quantized or not, whose logits are a product of the last hidden
            states with the head's weight, perhaps scaled or capped.
        batches: int64 token ids [N, T] with T >= 2, or an iterable of batches [B, T], texts [T], or dicts with
            input_ids and attention_mask (a tokenizer's output, a DataLoader). Padding is not text: every row is
            measured as if it were alone, without its padding. T may differ from batch to batch.
        teacher: a model with the same vocabulary, on the same device.
        progress: True or None for a bar on stderr if that is a terminal, else for a line every half a minute; False for
            nothing; or a function that is called with (batches done, number of batches, "").

    Raises:
        InvalidInputError: there is no text, batches have another shape or dtype or ids beyond the vocabulary, the model
            makes its logits in a way that klfast does not know, or a logit is NaN or infinite.
    """
    for one in (model, teacher):
        if one is not None:
            refuse_wrapper(one)
    vocabulary = linear_head(model).out_features
    teacher_vocabulary = vocabulary if teacher is None else linear_head(teacher).out_features
    if teacher_vocabulary != vocabulary:
        raise InvalidInputError(
            f"the teacher has {teacher_vocabulary} tokens, the model {vocabulary}; give models with one vocabulary"
        )
    most = _MOST_TOKENS if is_single(batches) else None
    parts = [batch.equal_lengths(most) for batch in read(batches, vocabulary)]

    tally = WindowStats(1, len(_MEASURED))
    with (
        deferred(),
        evaluation_mode(model),
        evaluation_mode(model if teacher is None else teacher),
        reporter(progress, "evaluate", len(parts)) as advance,
    ):
        some = next(ids for part in parts for ids in part)[:1, :8]
        head = _verified_head(model, some)
        teacher_head = head if teacher is None else _verified_head(teacher, some)
        readout = head.readout()
        teacher_readout = readout if teacher is None else teacher_head.readout()
        for part in parts:
            for ids in part:
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
                rows, length = ids.shape
                tally.add(
                    0, torch.stack(metrics).cpu().double().view(1, len(_MEASURED), rows, length - 1).sum(-1), length - 1
                )
            advance(1, "")

    mean, stderr = (dict(zip(_MEASURED, values, strict=True)) for values in (tally.mean(0), tally.stderr(0)))
    _require_finite(math.isfinite(mean["nll"]))
    plain = Evaluation(tally.tokens(0), _exp(mean["nll"]), mean["nll"], mean["nll"] / math.log(2))
    if teacher is None:
        return plain
    return replace(
        plain,
        kl=mean["kl"],
        kl_stderr=stderr["kl"],
        kl_student_teacher=mean["kl_student_teacher"],
        jsd=mean["jsd"],
        top1_agreement=mean["top1"],
        teacher_perplexity=_exp(mean["teacher_nll"]),
    )


def head_inputs(model: nn.Module, head: Head, ids: torch.Tensor) -> torch.Tensor:
    """Return the operand of the head's weight, [B, T, H], for int64 [B, T]."""
    return head.inputs(last_hidden(model, ids.to(head.device)))


def _verified_head(model: nn.Module, ids: torch.Tensor) -> Head:
    head, logits = find_head(model, ids)
    _require_finite(logits.isfinite().all())
    return head


def _require_finite(finite: object) -> None:
    if not finite:
        raise InvalidInputError("the model's logits hold a NaN or an infinity; its weights are damaged")


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
