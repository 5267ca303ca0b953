"""Quality of a model on a text, and its divergence from a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from klfast.core.progress import Progress
from klfast.core.window_stats import WindowStats
from klfast.evaluation.side_by_side import METRICS, measure, require_finite
from klfast.models.batches import Batches


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
            nothing; or a function that is called with (batches done, number of batches, ""). A batch whose rows differ
            in length counts as several, as does a tensor that holds all rows of a long text.

    Raises:
        InvalidInputError: there is no text, batches have another shape or dtype or ids beyond the vocabulary, the model
            makes its logits in a way that klfast does not know, or a logit is NaN or infinite.
    """
    tally = WindowStats(1, len(METRICS))

    def add(ids: torch.Tensor, metrics: torch.Tensor) -> None:
        tally.add(0, metrics.sum(-1).unsqueeze(0), metrics.shape[-1])

    measure(model, teacher, batches, add, progress, "evaluate")
    mean, stderr = (dict(zip(METRICS, values, strict=True)) for values in (tally.mean(0), tally.stderr(0)))
    require_finite(math.isfinite(mean["nll"]))
    plain = Evaluation(tally.tokens(0), perplexity(mean["nll"]), mean["nll"], mean["nll"] / math.log(2))
    if teacher is None:
        return plain
    return replace(
        plain,
        kl=mean["kl"],
        kl_stderr=stderr["kl"],
        kl_student_teacher=mean["kl_student_teacher"],
        jsd=mean["jsd"],
        top1_agreement=mean["top1"],
        teacher_perplexity=perplexity(mean["teacher_nll"]),
    )


def perplexity(nll: float) -> float:
    """Return exp(nll), infinite beyond what a float holds."""
    return math.exp(nll) if nll < 700 else math.inf
