"""How good a model is on a text, and how far it has moved from a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from klfast import ops
from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import deferred, interruptible
from klfast.core.progress import Progress, reporter
from klfast.core.window_stats import WindowStats
from klfast.models.adapters import refuse_wrapper
from klfast.models.batches import Batches, is_single, read
from klfast.models.forward import check_plain_head, evaluation_mode, head_inputs, plain_head
from klfast.nn import QuantLinear
from klfast.quant.tensor import QuantizedTensor

_MOST_TOKENS = 8192  # computed at once where the caller made no batches
_MEASURED = ("nll", "teacher_nll", "kl", "kl_student_teacher", "jsd", "top1")


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured; nats unless said otherwise, means over all predicted tokens.

    Attributes:
        tokens: predicted tokens, T - 1 of each row.
        perplexity: exp(nll).
        nll: negative log-likelihood of the text's own next token.
        bits_per_token: nll / log 2.
        kl: KL(teacher || model) of the next-token distributions.
        kl_stderr: its standard error, that of a mean over rows (as in a sweep), since the tokens of a row are correlated;
            NaN where there is but one row.
        kl_student_teacher: KL(model || teacher).
        jsd: Jensen-Shannon divergence.
        top1_agreement: share of the tokens for which both hold the same next token likeliest.
        teacher_perplexity: as perplexity.

    What compares with a teacher is None without one.
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
    """Perplexity of ``model`` on token batches and, with a teacher, how far its next-token distributions are from the teacher's.

    Each row is a text of its own: its first token has no context and is not predicted. Logits are never whole: memory
    goes with a batch's hidden states, [B, T, H].

    Args:
        model: a causal language model (transformers), quantized or not, whose logits are a plain product of the last
            hidden states with the head's weight.
        batches: int64 token ids [N, T] with T >= 2, or an iterable of batches [B, T], texts [T], or dicts with input_ids and
            attention_mask (a tokenizer's output, a DataLoader). Pads are no text: every row is measured as if it were
            alone, without its padding. T may differ from batch to batch.
        teacher: a model with the same vocabulary, on the same device.
        progress: True or None for a bar on stderr if that is a terminal, else for a line every half a minute; False for
            nothing; or a function that is called with (batches done, batches in all, "").

    Raises:
        InvalidInputError: no text at all, batches of another shape or dtype or with ids beyond the vocabulary; a model
            whose logits are not such a product; a NaN or infinite logit.
    """
    for one in (model, teacher):
        if one is not None:
            refuse_wrapper(one)
    head = _weight(plain_head(model))
    teacher_head = head if teacher is None else _weight(plain_head(teacher))
    if teacher_head.shape[0] != head.shape[0]:
        raise InvalidInputError(
            f"the teacher has {teacher_head.shape[0]} tokens, the model {head.shape[0]}; they need one vocabulary"
        )
    most = _MOST_TOKENS if is_single(batches) else None
    parts = [batch.equal_lengths(most) for batch in read(batches, head.shape[0])]

    tally = WindowStats(1, len(_MEASURED))
    with (
        deferred(),
        evaluation_mode(model),
        evaluation_mode(model if teacher is None else teacher),
        reporter(progress, "evaluate", len(parts)) as advance,
    ):
        some = next(ids for part in parts for ids in part)[:1, :8]
        for one in (model, teacher):
            if one is not None:
                _require_finite(check_plain_head(one, some).isfinite().all())
        for part in parts:
            for ids in part:
                with interruptible():
                    hidden = head_inputs(model, ids[:, :-1])
                    teacher_hidden = hidden if teacher is None else head_inputs(teacher, ids[:, :-1])
                    found = ops.linear_divergence(
                        teacher_hidden, teacher_head, hidden, head, ids[:, 1:].to(hidden.device)
                    )
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


def _weight(head: nn.Module) -> torch.Tensor | QuantizedTensor:
    return head.quantized if isinstance(head, QuantLinear) else head.weight.detach()


def _require_finite(finite: object) -> None:
    if not finite:
        raise InvalidInputError("the model's logits hold a NaN or an infinity; its weights are damaged")


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
