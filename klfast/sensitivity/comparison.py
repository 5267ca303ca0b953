"""Comparison of candidates with the teacher: sums of each metric over the tokens of each window of a micro-batch.

Logits of all tokens are never materialised at once. With a sampled vocabulary only candidates whose KL is large, or of
which the sample is not sure, meet all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klfast.core.errors import InvalidInputError
from klfast.core.interrupts import interruptible
from klfast.models.block_chain import Carry, Passage
from klfast.models.head import Head, Readout, divergence
from klfast.sensitivity import sampled_vocabulary
from klfast.sensitivity.differences import Products
from klfast.sensitivity.results import METRICS
from klfast.sensitivity.sampled_vocabulary import Sample
from klfast.sensitivity.stages import Stages

COLUMNS = (*METRICS, "ce_teacher")  # of the sums
SAMPLED = ("kl_teacher_student", "delta_ce")  # the metrics that a part of the vocabulary gives
SQNR_CAP = 150.0  # dB; beyond float32's resolution, so that a token with equal logits does not make the mean infinite
LARGE = 0.1  # nats: a mean KL above this is measured with the whole vocabulary,
UNSURE = 0.05  # as is one whose standard error over draws is more than this share of it


@dataclass(frozen=True)
class Teacher:
    """The full-precision model on one micro-batch of B windows, T tokens each.

    Attributes:
        passage: the micro-batch.
        carries: the input of each block, in order.
        products: of each block's large linear layers, for suffixes by differences; empty without these.
        hidden: input of the head, [B * (T - 1), H]; a window's last token has no next one to be compared at.
        targets: the next tokens, int64 [B * (T - 1)].
        sample: the part of the vocabulary that stands for all of it; None to compare all of it.
    """

    passage: Passage
    carries: list[Carry]
    products: list[Products]
    hidden: torch.Tensor
    targets: torch.Tensor
    sample: Sample | None


class Comparison:
    """Compares the head's inputs, in the head's dtype, with the teacher's.

    Sums are float64 [C, len(COLUMNS), B], for C candidates and B windows; of a sampled vocabulary only ``SAMPLED`` and
    ce_teacher, and zeros in the other columns. All of a candidate are NaN where it makes a NaN or an infinity.

    Attributes:
        full_head: the full-precision head, unaffected while the head is swapped.
        vocabulary_rows: of a sample a token; None for the whole vocabulary.
        in_full: comparisons with the whole vocabulary so far, one a candidate and micro-batch.
    """

    def __init__(self, head: Head, vocabulary_rows: int | None, stages: Stages) -> None:
        self.full_head = head.readout()
        self.vocabulary_rows = vocabulary_rows
        self.in_full = 0
        self._dtype, self._stages = head.dtype, stages

    def teacher(
        self, passage: Passage, carries: list[Carry], products: list[Products], hidden: torch.Tensor
    ) -> Teacher:
        """Return a micro-batch's teacher, whose head has the input [B, T, H]."""
        compared, ids = self.scored(hidden)[0], passage.input_ids
        rows = self.vocabulary_rows
        sample = None if rows is None else sampled_vocabulary.draw(self.full_head, compared, ids, rows)
        return Teacher(passage, carries, products, compared, ids[:, 1:].flatten(), sample)

    def scored(self, hidden: torch.Tensor, candidates: int = 1) -> torch.Tensor:
        """Return [C * B, T, H] without each window's last token, in the head's dtype: [C, B * (T - 1), H]."""
        return hidden[:, :-1].to(self._dtype).reshape(candidates, -1, hidden.shape[-1])

    def under_full_head(self, teacher: Teacher, hidden: torch.Tensor) -> torch.Tensor:
        """Compare the head's input [C, B * (T - 1), H] with the teacher's under the full-precision head."""
        if teacher.sample is None:
            return self.in_full_under(self.full_head, teacher, hidden)
        with self._stages.timed("divergence"), interruptible():
            found = sampled_vocabulary.estimate(teacher.sample, self.full_head, teacher.hidden, hidden)
        mean, error = found.kl.mean(-1), found.variance.sum(-1).sqrt() / found.variance.shape[-1]
        is_sure = (mean <= LARGE) & (error <= UNSURE * mean)  # not where they are NaN
        columns = [COLUMNS.index(name) for name in (*SAMPLED, "ce_teacher")]
        sums = torch.zeros(len(hidden), len(COLUMNS), len(teacher.passage.input_ids), dtype=torch.float64)
        for column, per_token in zip(columns, (found.kl, found.delta_ce, teacher.sample.ce), strict=True):
            sums[:, column] = _by_window(teacher, per_token)
        if len(doubtful := (~is_sure).nonzero().flatten().cpu()):
            whole = self.in_full_under(self.full_head, teacher, hidden[doubtful.to(hidden.device)])
            sums[doubtful.unsqueeze(-1), columns] = whole[:, columns]
        return sums

    def in_full_under(self, head: Readout, teacher: Teacher, hidden: torch.Tensor) -> torch.Tensor:
        """Compare the head's input [C, B * (T - 1), H] with the teacher's over the whole vocabulary under ``head``."""
        try:
            sums = self._divergences(head, teacher, hidden)
        except InvalidInputError:  # a logit is NaN, or too large to compare
            if len(hidden) == 1:
                return torch.full((1, len(COLUMNS), len(teacher.passage.input_ids)), torch.nan, dtype=torch.float64)
            return torch.cat([self.in_full_under(head, teacher, one) for one in hidden.split(1)])
        self.in_full += len(hidden)
        sums[~sums.isfinite().flatten(1).all(1)] = torch.nan
        return sums

    def _divergences(self, head: Readout, teacher: Teacher, hidden: torch.Tensor) -> torch.Tensor:
        with self._stages.timed("divergence"):
            with interruptible():
                found = divergence(teacher.hidden, self.full_head, hidden, head, teacher.targets)
            assert found.ce_student is not None and found.ce_teacher is not None  # there are targets
            columns = {"delta_ce": found.ce_student - found.ce_teacher, "sqnr_db": found.sqnr_db.clamp(max=SQNR_CAP)}
            per_token = torch.stack([columns[name] if name in columns else getattr(found, name) for name in COLUMNS])
            return _by_window(teacher, per_token.view(len(COLUMNS), len(hidden), -1)).transpose(0, 1)


def _by_window(teacher: Teacher, per_token: torch.Tensor) -> torch.Tensor:
    """Sum [..., B * (T - 1)] over each window's tokens: float64 [..., B]."""
    windows = len(teacher.passage.input_ids)  # on the CPU, as some GPUs have no float64
    sums: torch.Tensor = per_token.cpu().double().view(*per_token.shape[:-1], windows, -1).sum(-1)
    return sums
