"""KL(p || q) from a sample of the vocabulary: each token's likeliest entries exactly, the rest drawn from the teacher.

With p the teacher's probabilities, d = student - teacher logits, weights w = p for the K likeliest entries and (mass of
the rest) / M for each of M entries drawn from the rest with their probabilities, and mu = sum w d:

    KL(p || q) = log sum p exp(d) - sum p d  ~  log sum w exp(d - mu)

The sum is taken as 1 + sum w (expm1(d - mu) - (d - mu)), which has no cancellation, as sum w (d - mu) = 0. An estimated
sum makes its logarithm too small by half its variance, which is added. The change of the cross-entropy is sum p d + KL
minus d of the target; its first term is the change of the hidden state times the head's mean row, sum p W.

The draw belongs to the text of a window, so all candidates share it, however windows are grouped and wherever a sweep
was stopped.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import torch

from klfast import ops
from klfast.models.head import Readout
from klfast.reference.divergence import raise_not_finite

ROWS = 128  # of the vocabulary a token, half of them the likeliest: the mean KL within 0.1 to 0.2 % at 2,048 tokens
FEWEST_ROWS = 4  # two of them drawn, so that they have a variance
_MOST_LOGITS = 2**22  # made at once: 16 MiB, twice that in float64
_WIDENED_ROWS = 8192  # rows of a 16-bit head that are in float32 at a time
_MOST_CHANGES = 2**20  # differences of logits, in float64: 8 MiB


@dataclass(frozen=True)
class Sample:
    """A part of the vocabulary for each of T tokens.

    Attributes:
        index: int64 [T, K + M + 1]: the K likeliest entries, M drawn ones, the target.
        weights: float64 [T, K + M], which add up to 1.
        tail: float64 [T], the probability of all but the likeliest.
        mean_row: float32 [T, H], the head's mean row under the teacher's probabilities; None for a head with a cap.
        capped: float64 [T, K + M + 1], the teacher's logits as shares of the head's cap; None for a head without one.
        drawn: M.
        ce: float64 [T], the teacher's cross-entropy against the targets, nats.
    """

    index: torch.Tensor
    weights: torch.Tensor
    tail: torch.Tensor
    mean_row: torch.Tensor | None
    capped: torch.Tensor | None
    drawn: int
    ce: torch.Tensor


@dataclass(frozen=True)
class Estimate:
    """What a sample says of C candidates; each is float64 [C, T], in nats.

    ``variance`` is that of ``kl`` over draws. ``delta_ce`` is the student's cross-entropy minus the teacher's, exact
    but for the error of ``kl``; with a cap sum p d is estimated, too.
    """

    kl: torch.Tensor
    delta_ce: torch.Tensor
    variance: torch.Tensor


def draw(readout: Readout, hidden: torch.Tensor, windows: torch.Tensor, rows: int) -> Sample:
    """Draw a sample for windows, int64 [B, T + 1], from the head's input [B * T, H].

    Raises:
        InvalidInputError: a logit is a NaN or infinite.
    """
    numbers = torch.cat([_uniform(window, rows - rows // 2) for window in windows])
    targets = windows[:, 1:].reshape(-1, 1)
    size = max(1, _MOST_LOGITS // readout.weight.shape[0])
    parts = zip(hidden.split(size), numbers.split(size), targets.split(size), strict=True)
    return _joined([_draw(readout, some, uniform, wanted, rows // 2) for some, uniform, wanted in parts])


def estimate(sample: Sample, readout: Readout, teacher: torch.Tensor, students: torch.Tensor) -> Estimate:
    """Compare students' hidden states [C, T, H] with the teacher's [T, H] under the head that the sample is of."""
    size = max(1, _MOST_CHANGES // (len(students) * sample.index.shape[1]))
    found = []
    for start in range(0, len(teacher), size):
        some = slice(start, start + size)
        change = students[:, some].float() - teacher[some].float()
        d = _changes_of_logits(sample, readout, change, some)
        kl, mean, variance = _of_changes(d[..., :-1], sample.weights[some], sample.tail[some], sample.drawn)
        if sample.mean_row is not None:
            mean = _wide(torch.einsum("cth,th->ct", change, sample.mean_row[some])) * readout.rule.scale
        found.append((kl, mean + kl - d[..., -1], variance))
    kl, delta_ce, variance = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    return Estimate(kl, delta_ce, variance)


def _uniform(window: torch.Tensor, drawn: int) -> torch.Tensor:
    """Return float64 [T, M] in [0, 1) for a window of T + 1 ids, the same for the same text on every device."""
    text = hashlib.sha256(window.cpu().contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(text[:8], "little", signed=True))
    return torch.rand(len(window) - 1, drawn, dtype=torch.float64, generator=generator)


def _draw(
    readout: Readout, hidden: torch.Tensor, numbers: torch.Tensor, targets: torch.Tensor, likeliest: int
) -> Sample:
    logits = readout.logits(hidden)  # [t, V]
    if not torch.isfinite(logits).all():
        token, column = (~torch.isfinite(logits)).nonzero()[0].tolist()
        raise_not_finite("teacher", token, column)
    log_p = logits.log_softmax(-1)
    top = log_p.topk(likeliest)
    of_target = log_p.gather(-1, targets.to(log_p.device)).squeeze(-1)
    cap = readout.rule.softcap
    mean_row = _mean_row(log_p.exp(), readout) if cap is None else None
    below = _wide(log_p.scatter_(-1, top.indices, -torch.inf).exp_()).cumsum_(-1)  # of all but the likeliest
    tail = below[:, -1:]
    entries = torch.searchsorted(below, numbers.to(below.device) * tail, right=True).clamp(max=logits.shape[1] - 1)
    index = torch.cat((top.indices.to(below.device), entries, targets.to(below.device)), -1)
    weights = torch.cat((_wide(top.values).exp(), (tail / entries.shape[1]).expand_as(entries)), -1)
    return Sample(
        index,
        weights / weights.sum(-1, keepdim=True),
        tail.squeeze(-1),
        mean_row,
        None if cap is None else _wide(logits.gather(-1, index.to(logits.device))) / cap,
        entries.shape[1],
        -_wide(of_target),
    )


def _mean_row(p: torch.Tensor, readout: Readout) -> torch.Tensor:
    """Return the mean of the head's rows, float32 [t, H], under probabilities [t, V]."""
    assert isinstance(readout.weight, torch.Tensor)  # sweeps take full-precision models
    parts = zip(p.split(_WIDENED_ROWS, -1), readout.weight.split(_WIDENED_ROWS), strict=True)
    return torch.stack([some @ rows.float() for some, rows in parts]).sum(0)


def _joined(samples: list[Sample]) -> Sample:
    columns = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
    joined: dict[str, Any] = {
        name: torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0]
        for name, column in columns.items()
    }
    return Sample(**joined)


def _changes_of_logits(sample: Sample, readout: Readout, change: torch.Tensor, some: slice) -> torch.Tensor:
    """Return student - teacher logits, float64 [C, T, K + M + 1]: the head's product with the hidden states' change.

    A bias cancels. tanh(a + b) - tanh(a) = (1 - tanh(a)^2) tanh(b) / (1 + tanh(a) tanh(b)) serves a cap.
    """
    assert isinstance(readout.weight, torch.Tensor)  # sweeps take full-precision models
    index = sample.index[some].to(change.device)
    found = _wide(ops.gathered_logits(change, readout.weight, index)) * readout.rule.scale
    cap = readout.rule.softcap
    if cap is None or sample.capped is None:
        return found
    before, moved = sample.capped[some], (found / cap).tanh()
    return cap * (1 - before.square()) * moved / (1 + before * moved)


def _of_changes(
    d: torch.Tensor, weights: torch.Tensor, tail: torch.Tensor, drawn: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the KL of changes of logits [C, T, K + M], their mean, and the KL's variance over draws: [C, T] each."""
    mean = (weights * d).sum(-1)
    x = d - mean.unsqueeze(-1)
    growth = x.expm1()
    excess = growth - x
    total = (weights * excess).sum(-1)
    share = tail.square() / drawn
    of_sum = share * growth[..., -drawn:].var(-1)
    kl = total.log1p() + of_sum / (2 * (1 + total).square())
    of_kl = excess - growth * (total / (1 + total)).unsqueeze(-1)  # growth / (1 + total) - x, by both terms of the KL
    return kl, mean, share * of_kl[..., -drawn:].var(-1)


def _wide(t: torch.Tensor) -> torch.Tensor:
    """Return float64, on the CPU where a device may lack it (Intel's GPUs)."""
    return (t if t.device.type in ("cpu", "cuda") else t.cpu()).double()
