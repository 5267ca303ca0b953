"""The reference of the divergence ops: plain torch in float64, a few tokens at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from klfast.core.errors import InvalidInputError
from klfast.dispatch.arguments import GatheredLogits
from klfast.quant.tensor import QuantizedTensor

IGNORED_TARGET = -100  # as in torch.nn.functional.cross_entropy
_CHUNK = 16  # tokens in float64 at a time


def logit_divergence(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """Return the metrics of ``Divergence`` in its order, float32 [8, T], for logits [T, V].

    Cross-entropies are NaN without targets.
    """
    tokens, vocab = teacher.shape
    check_targets(targets, vocab)
    metrics = torch.full((8, tokens), math.nan, dtype=torch.float64, device=teacher.device)
    for start in range(0, tokens, _CHUNK):
        part = slice(start, start + _CHUNK)
        rows = teacher[part].double(), student[part].double()
        for who, logits in zip(("teacher", "student"), rows, strict=True):
            if not torch.isfinite(logits).all():
                token, column = (~torch.isfinite(logits)).nonzero()[0].tolist()
                raise_not_finite(who, start + token, column)
        metrics[:, part] = _compare(*rows, None if targets is None else targets[part])
    return metrics.float()


def linear_divergence(
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor | QuantizedTensor,
    student_hidden: torch.Tensor,
    student_head: torch.Tensor | QuantizedTensor,
    targets: torch.Tensor | None,
) -> torch.Tensor:
    """Apply ``logit_divergence`` to hidden states [T, H] and [S * T, H] times their heads [V, H], in float32.

    Token s * T + t of the student is compared with token t of the teacher.
    """
    tokens = student_hidden.shape[0]
    heads = [
        head.dequantize(torch.float32) if isinstance(head, QuantizedTensor) else head.float()
        for head in (teacher_head, student_head)
    ]
    check_targets(targets, heads[0].shape[0])
    metrics = torch.empty(8, tokens, device=student_hidden.device)
    for start in range(0, tokens, _CHUNK):
        part = torch.arange(start, min(start + _CHUNK, tokens), device=student_hidden.device)
        teacher = teacher_hidden[part % teacher_hidden.shape[0]].float() @ heads[0].T
        student = student_hidden[part].float() @ heads[1].T
        metrics[:, part] = logit_divergence(teacher, student, None if targets is None else targets[part])
    return metrics


def _compare(teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    """Return the metrics [8, T] of float64 logits [T, V]."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    x = log_q - log_p
    jsd = -(log_p.exp() * _log_mixture(x) + log_q.exp() * _log_mixture(-x)).sum(-1) / 2
    d = student - teacher
    noise = d.square().sum(-1)
    sqnr = torch.where(noise > 0, 10 * torch.log10(teacher.square().sum(-1) / noise), math.inf)
    if targets is None:
        ce = torch.full((2, len(teacher)), math.nan, dtype=torch.float64, device=teacher.device)
    else:
        index = targets.clamp(min=0).unsqueeze(-1)
        ce = torch.stack([-x.gather(-1, index).squeeze(-1) for x in (log_p, log_q)])
        ce = ce.masked_fill(targets == IGNORED_TARGET, math.nan)
    agree = (_first_argmax(teacher) == _first_argmax(student)).double()
    return torch.stack(
        (_kl(log_p, log_q), _kl(log_q, log_p), jsd.clamp(min=0), noise / teacher.shape[-1], sqnr, *ce, agree)
    )


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Sum p (e^x - 1 - x), x = log(q / p), to KL(p || q): no term is negative, and p (e^x - 1) sums to zero."""
    x, p = log_q - log_p, log_p.exp()
    small = p * (torch.expm1(x) - x).clamp(min=0)
    return torch.where(x.abs() < 1, small, log_q.exp() - p - p * x).sum(-1)


def _log_mixture(x: torch.Tensor) -> torch.Tensor:
    """Return log(m / p), with m = (p + q) / 2 and x = log(q / p)."""
    return torch.where(x.abs() < 1, torch.log1p(torch.expm1(x) / 2), F.softplus(x, threshold=40) - math.log(2))


def _first_argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the lowest index of the largest value (torch.argmax may return any of several)."""
    index = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == logits.amax(-1, keepdim=True), index, logits.shape[-1]).amin(-1)


def check_targets(targets: torch.Tensor | None, vocab: int) -> None:
    """Raise unless every target is a token of the vocabulary or the ignored index."""
    if targets is None:
        return
    bad = ((targets < 0) & (targets != IGNORED_TARGET)) | (targets >= vocab)
    if bad.any():
        value = targets[bad][0].item()
        raise InvalidInputError(
            f"targets must be in 0..{vocab - 1}, or {IGNORED_TARGET} to ignore a token; got {value}"
        )


def gathered_logits(a: GatheredLogits) -> torch.Tensor:
    """Return hidden states [S, T, H] times the rows ``rows`` [T, J] of a head [V, H]: float32 [S, T, J]."""
    check_rows(a.rows, a.head.shape[0])
    students, tokens = a.hidden.shape[:2]
    out = torch.empty(students, tokens, a.rows.shape[1], device=a.hidden.device)
    for start in range(0, tokens, _CHUNK):
        part = slice(start, start + _CHUNK)
        gathered = a.head[a.rows[part]].double()  # [t, J, H]
        out[:, part] = torch.einsum("sth,tjh->stj", a.hidden[:, part].double(), gathered).float()
    return out


def check_rows(rows: torch.Tensor, vocab: int) -> None:
    """Raise InvalidInputError unless a head with ``vocab`` rows has all of ``rows``."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < vocab:
        wrong = rows[(rows < 0) | (rows >= vocab)][0].item()
        raise InvalidInputError(f"gathered_logits: rows must be in 0..{vocab - 1}, got {wrong}")


def raise_not_finite(who: str, token: int, column: int) -> None:
    """Raise the error for a NaN or infinity in the logits of ``who`` ("teacher" or "student")."""
    raise InvalidInputError(
        f"the {who}'s logit of token {token}, vocabulary entry {column}, is a NaN or an infinity; "
        "give masked entries a large finite value in both models, or leave them out"
    )


def raise_too_large(who: str, token: int, column: int) -> None:
    """Raise the error for a finite logit of ``who`` whose difference to the token's largest exceeds float32."""
    raise InvalidInputError(
        f"the {who}'s logit of token {token}, vocabulary entry {column}, is too large: the difference to the token's "
        f"largest logit must stay within float32, {torch.finfo(torch.float32).max:.1e}"
    )
