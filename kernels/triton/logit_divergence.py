"""logit_divergence in one pass over the logits: sums of each row, in parts of the vocabulary, all around one anchor a row.

The anchor comes from the first columns of a row. The parts are added, and the metrics made of them, in float64 on the
CPU: 80 bytes a part instead of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from klfast.kernels.divergence_terms import N_SUMS, divergence_terms, store_sums
from klfast.kernels.launch import Launch, cdiv, options


@triton.jit
def first_anchors(t_ptr, s_ptr, anchor_ptr, V, stride_t, stride_s, BV: tl.constexpr):
    """log(sum e^b) - log(sum e^a) of the first BV columns of each row, float32 [T]."""
    i_row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    a = tl.load(t_ptr + i_row * stride_t + tl.minimum(o_v, V - 1)).to(tl.float32)
    b = tl.load(s_ptr + i_row * stride_s + tl.minimum(o_v, V - 1)).to(tl.float32)
    max_a, max_b = tl.max(a, axis=0), tl.max(b, axis=0)
    sum_a = tl.sum(tl.where(o_v < V, tl.exp(a - max_a), 0.0), axis=0)
    sum_b = tl.sum(tl.where(o_v < V, tl.exp(b - max_b), 0.0), axis=0)
    tl.store(anchor_ptr + i_row, (max_b + tl.log(sum_b)) - (max_a + tl.log(sum_a)))


@triton.jit
def divergence_sums(
    t_ptr, s_ptr,  # float [T, V], rows stride_t and stride_s apart
    rows_ptr,  # int64 [R], the rows to compare; None for all
    anchor_ptr,  # float32 [R]
    sums_ptr,  # float32 [R, parts, N]
    index_ptr,  # int32 [R, parts, 2]: where a and b are largest, the lowest index among equals
    V, part_columns, stride_t, stride_s,
    N: tl.constexpr, BV: tl.constexpr,
):
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = i_row if rows_ptr is None else tl.load(rows_ptr + i_row)
    p_a, p_b = t_ptr + row * stride_t, s_ptr + row * stride_s
    anchor = tl.load(anchor_ptr + i_row)
    first = i_part * part_columns
    last = tl.minimum(first + part_columns, V)
    reference = tl.full((), -float("inf"), tl.float32)
    mu0 = tl.zeros((BV,), tl.float32)
    mu1, mu2, mu3, mu4, mu5, mu6, mu7, mu8 = mu0, mu0, mu0, mu0, mu0, mu0, mu0, mu0
    k1, k2, j, q, a2, d2 = mu0, mu0, mu0, mu0, mu0, mu0
    max_a = tl.full((BV,), -float("inf"), tl.float32)
    max_b = max_a
    at_a = tl.zeros((BV,), tl.int32)
    at_b = at_a
    for start in range(first, last, BV):
        o_v = tl.minimum(start + tl.arange(0, BV), last - 1)
        valid = tl.where(start + tl.arange(0, BV) < last, 1.0, 0.0)
        a, b = tl.load(p_a + o_v).to(tl.float32), tl.load(p_b + o_v).to(tl.float32)
        needed = tl.max(tl.maximum(a, b - anchor), axis=0)
        if needed > reference:
            shrink = tl.exp(reference - needed)
            mu0, mu1, mu2, mu3, mu4 = mu0 * shrink, mu1 * shrink, mu2 * shrink, mu3 * shrink, mu4 * shrink
            mu5, mu6, mu7, mu8 = mu5 * shrink, mu6 * shrink, mu7 * shrink, mu8 * shrink
            k1, k2, j, q = k1 * shrink, k2 * shrink, j * shrink, q * shrink
            reference = needed
        w, u, k1_term, k2_term, j_term, q_term = divergence_terms(a, b, anchor, reference, valid)
        k1, k2, j, q = k1 + k1_term, k2 + k2_term, j + j_term, q + q_term
        t2, odd = u * u, w * u
        mu0, mu1 = mu0 + w, mu1 + odd
        w, odd = w * t2, odd * t2
        mu2, mu3 = mu2 + w, mu3 + odd
        w, odd = w * t2, odd * t2
        mu4, mu5 = mu4 + w, mu5 + odd
        w, odd = w * t2, odd * t2
        mu6, mu7 = mu6 + w, mu7 + odd
        mu8 += w * t2
        d = (b - a) * valid
        a2, d2 = a2 + a * a * valid, d2 + d * d
        at_a, at_b = tl.where(a > max_a, o_v, at_a), tl.where(b > max_b, o_v, at_b)
        max_a, max_b = tl.maximum(max_a, a), tl.maximum(max_b, b)

    top_a, top_b = tl.max(max_a, axis=0), tl.max(max_b, axis=0)
    cell = i_row * tl.num_programs(1) + i_part
    store_sums(
        sums_ptr + cell * N, tl.sum(mu0, axis=0), tl.sum(mu1, axis=0), tl.sum(mu2, axis=0), tl.sum(mu3, axis=0), tl.sum(mu4, axis=0),
        tl.sum(mu5, axis=0), tl.sum(mu6, axis=0), tl.sum(mu7, axis=0), tl.sum(mu8, axis=0), tl.sum(k1, axis=0), tl.sum(k2, axis=0),
        tl.sum(j, axis=0), tl.sum(q, axis=0), tl.sum(a2, axis=0), tl.sum(d2, axis=0), top_a, top_b, reference, None,
    )  # fmt: skip
    tl.store(index_ptr + cell * 2, tl.min(tl.where(max_a == top_a, at_a, 2147483647), axis=0))
    tl.store(index_ptr + cell * 2 + 1, tl.min(tl.where(max_b == top_b, at_b, 2147483647), axis=0))


@dataclass(frozen=True)
class Config:
    """BV columns at a time; parts of at least ``part`` columns."""

    BV: int
    part: int
    num_warps: int
    grf_mode: str | None = None


CONFIGS = {"nvidia": Config(512, 8192, 4), "intel": Config(512, 8192, 8, "256")}
ANCHOR_COLUMNS = 2048


def plan_anchors(teacher: torch.Tensor, student: torch.Tensor, anchor: torch.Tensor) -> Launch:
    """The launch that finds the first anchors, float32 [T], of logits [T, V]."""
    args = dict(
        t_ptr=teacher, s_ptr=student, anchor_ptr=anchor, V=teacher.shape[1], stride_t=teacher.stride(0), stride_s=student.stride(0), BV=ANCHOR_COLUMNS
    )
    return Launch(first_anchors, (anchor.numel(),), args, dict(num_warps=8))


def plan_sums(
    teacher: torch.Tensor, student: torch.Tensor, rows: torch.Tensor | None, anchor: torch.Tensor, *, family: str, cores: int
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch that sums rows around anchors [R], and what it fills: sums [R, parts, N_SUMS], index [R, parts, 2].

    Rows of the logits are without gaps; ``rows`` int64 [R] picks some of them.
    """
    config, vocab, count = CONFIGS[family], teacher.shape[1], anchor.numel()
    parts = max(1, min(cdiv(vocab, config.part), cdiv(8 * cores, max(count, 1))))
    columns = cdiv(cdiv(vocab, parts), config.BV) * config.BV
    parts = cdiv(vocab, columns)
    sums = torch.empty(count, parts, N_SUMS, device=teacher.device)
    index = torch.empty(count, parts, 2, dtype=torch.int32, device=teacher.device)
    args = dict(
        t_ptr=teacher, s_ptr=student, rows_ptr=rows, anchor_ptr=anchor, sums_ptr=sums, index_ptr=index, V=vocab, part_columns=columns,
        stride_t=teacher.stride(0), stride_s=student.stride(0), N=N_SUMS, BV=config.BV,
    )  # fmt: skip
    return Launch(divergence_sums, (count, parts), args, options(config)), sums, index
