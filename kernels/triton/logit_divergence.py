"""logit_divergence in one pass over the logits: sums of each row in parts of the vocabulary, around one anchor per row.

On NVIDIA GPUs a program is one warp, so that no maximum waits for other warps. The anchor comes from a row's first
columns. The CPU adds the parts, and turns them into metrics, in float64: 80 bytes per part instead of the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from klfast.kernels.divergence_terms import N_SUMS, divergence_terms, store_sums
from klfast.kernels.launch import Launch, cdiv, options, speaks_ptx

import triton
import triton.language as tl


@triton.jit
def first_anchors(t_ptr, s_ptr, anchor_ptr, T, V, stride_t, stride_s, BV: tl.constexpr):
    """Compute log(sum e^b) - log(sum e^a) of the first BV columns of each row of the student, float32 [S * T].

    The teacher's row is the student's modulo T.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    a = tl.load(t_ptr + (i_row % T) * stride_t + tl.minimum(o_v, V - 1)).to(tl.float32)
    b = tl.load(s_ptr + i_row * stride_s + tl.minimum(o_v, V - 1)).to(tl.float32)
    max_a, max_b = tl.max(a, axis=0), tl.max(b, axis=0)
    sum_a = tl.sum(tl.where(o_v < V, tl.exp(a - max_a), 0.0), axis=0)
    sum_b = tl.sum(tl.where(o_v < V, tl.exp(b - max_b), 0.0), axis=0)
    tl.store(anchor_ptr + i_row, (max_b + tl.log(sum_b)) - (max_a + tl.log(sum_a)))


@triton.jit
def divergence_sums(
    t_ptr,
    s_ptr,  # float [T, V] and [S * T, V], rows stride_t and stride_s times ALIGN apart
    rows_ptr,  # int64 [R], the rows of both to compare (S is 1); None for all of the student's, each with row i % T
    anchor_ptr,  # float32 [R]
    sums_ptr,  # float32 [R, parts, N]
    index_ptr,  # int32 [R, parts, 2]: columns of the largest a and b, the lowest among equals
    T,
    V,
    part_columns,
    stride_t,
    stride_s,
    ALIGN: tl.constexpr,  # divides V and the distance between rows
    N: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sum the terms of one row over one part of the vocabulary."""
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t_row, s_row = (tl.program_id(0) % T).to(tl.int64), i_row
    if rows_ptr is not None:
        t_row = tl.load(rows_ptr + i_row)
        s_row = t_row
    p_a, p_b = t_ptr + t_row * stride_t * ALIGN, s_ptr + s_row * stride_s * ALIGN
    anchor = tl.load(anchor_ptr + i_row)
    first = i_part * part_columns
    last = tl.minimum(first + part_columns, V)
    reference = tl.full((), -float("inf"), tl.float32)
    max_a, max_b = reference, reference
    at_a = tl.full((), 0, tl.int32)
    at_b = at_a
    mu0 = tl.zeros((BV,), tl.float32)
    mu1, mu2, mu3, mu4, mu5, mu6, mu7, mu8 = mu0, mu0, mu0, mu0, mu0, mu0, mu0, mu0
    k1, k2, j, q, a2, d2 = mu0, mu0, mu0, mu0, mu0, mu0
    o_block = tl.arange(0, BR)[:, None] * BV + tl.arange(0, BV)[None, :]  # [BR, BV]
    for start in range(first, last, BR * BV):
        o_v = start + o_block
        is_here = tl.max_constancy(o_v < last, [1, ALIGN])
        a = tl.load(p_a + o_v, mask=is_here, other=0.0).to(tl.float32)
        b = tl.load(p_b + o_v, mask=is_here, other=0.0).to(tl.float32)
        only_a, only_b = tl.where(is_here, a, -float("inf")), tl.where(is_here, b, -float("inf"))
        top_a, top_b = tl.max(only_a), tl.max(only_b)
        if top_a > max_a:
            max_a, at_a = top_a, tl.min(tl.where(only_a == top_a, o_v, 2147483647))
        if top_b > max_b:
            max_b, at_b = top_b, tl.min(tl.where(only_b == top_b, o_v, 2147483647))
        needed = tl.maximum(top_a, top_b - anchor)
        if needed > reference:
            shrink = tl.exp(reference - needed)
            mu0, mu1, mu2, mu3, mu4 = mu0 * shrink, mu1 * shrink, mu2 * shrink, mu3 * shrink, mu4 * shrink
            mu5, mu6, mu7, mu8 = mu5 * shrink, mu6 * shrink, mu7 * shrink, mu8 * shrink
            k1, k2, j, q = k1 * shrink, k2 * shrink, j * shrink, q * shrink
            reference = needed
        valid = tl.where(is_here, 1.0, 0.0)
        if tl.max(tl.abs(b - a - anchor) * valid) < 0.5:
            w, u, k1_term, k2_term, j_term, q_term = divergence_terms(a, b, anchor, reference, valid, True, PTX)
        else:
            w, u, k1_term, k2_term, j_term, q_term = divergence_terms(a, b, anchor, reference, valid, False, PTX)
        k1, k2, j, q = k1 + tl.sum(k1_term, 0), k2 + tl.sum(k2_term, 0), j + tl.sum(j_term, 0), q + tl.sum(q_term, 0)
        t2 = u * u
        mu0, mu1 = mu0 + tl.sum(w, 0), mu1 + tl.sum(w * u, 0)
        w *= t2
        mu2, mu3 = mu2 + tl.sum(w, 0), mu3 + tl.sum(w * u, 0)
        w *= t2
        mu4, mu5 = mu4 + tl.sum(w, 0), mu5 + tl.sum(w * u, 0)
        w *= t2
        mu6, mu7 = mu6 + tl.sum(w, 0), mu7 + tl.sum(w * u, 0)
        mu8 += tl.sum(w * t2, 0)
        d = b - a  # 0 beyond the last column, as is a
        a2, d2 = a2 + tl.sum(a * a, 0), d2 + tl.sum(d * d, 0)

    cell = i_row * tl.num_programs(1) + i_part
    store_sums(
        sums_ptr + cell * N,
        tl.sum(mu0, axis=0),
        tl.sum(mu1, axis=0),
        tl.sum(mu2, axis=0),
        tl.sum(mu3, axis=0),
        tl.sum(mu4, axis=0),
        tl.sum(mu5, axis=0),
        tl.sum(mu6, axis=0),
        tl.sum(mu7, axis=0),
        tl.sum(mu8, axis=0),
        tl.sum(k1, axis=0),
        tl.sum(k2, axis=0),
        tl.sum(j, axis=0),
        tl.sum(q, axis=0),
        tl.sum(a2, axis=0),
        tl.sum(d2, axis=0),
        max_a,
        max_b,
        reference,
        None,
    )
    tl.store(index_ptr + cell * 2, at_a)
    tl.store(index_ptr + cell * 2 + 1, at_b)


@dataclass(frozen=True)
class Config:
    """Configuration: BR times BV columns at a time, of which BR are summed at once; ``part`` columns or more a part."""

    BR: int
    BV: int
    part: int
    num_warps: int
    grf_mode: str | None = None


CONFIGS = {"nvidia": Config(2, 128, 2048, 1), "intel": Config(1, 512, 8192, 8, "256")}
ANCHOR_COLUMNS = 2048


def plan_anchors(teacher: torch.Tensor, student: torch.Tensor, anchor: torch.Tensor) -> Launch:
    """Return the launch that computes the first anchors, float32 [S * T], of logits [T, V] and [S * T, V]."""
    args = dict(
        t_ptr=teacher,
        s_ptr=student,
        anchor_ptr=anchor,
        T=teacher.shape[0],
        V=teacher.shape[1],
        stride_t=teacher.stride(0),
        stride_s=student.stride(0),
        BV=ANCHOR_COLUMNS,
    )
    return Launch(first_anchors, (anchor.numel(),), args, dict(num_warps=8))


def plan_sums(
    teacher: torch.Tensor,
    student: torch.Tensor,
    rows: torch.Tensor | None,
    anchor: torch.Tensor,
    *,
    family: str,
    cores: int,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Return the launch that sums rows around anchors [R], and its outputs.

    These are sums [R, parts, N_SUMS] and index [R, parts, 2].

    Rows of the logits are contiguous; ``rows`` int64 [R] selects some. If the teacher has fewer rows than the student,
    the student's row i is compared with the teacher's row i modulo their number.
    """
    config, vocab, count = CONFIGS[family], teacher.shape[1], anchor.numel()
    parts = max(1, min(cdiv(vocab, config.part), cdiv(8 * cores, max(count, 1))))
    block = config.BR * config.BV
    columns = cdiv(cdiv(vocab, parts), block) * block
    parts = cdiv(vocab, columns)
    align = math.gcd(vocab, teacher.stride(0), student.stride(0), 4)
    sums = torch.empty(count, parts, N_SUMS, device=teacher.device)
    index = torch.empty(count, parts, 2, dtype=torch.int32, device=teacher.device)
    args = dict(
        t_ptr=teacher,
        s_ptr=student,
        rows_ptr=rows,
        anchor_ptr=anchor,
        sums_ptr=sums,
        index_ptr=index,
        T=teacher.shape[0],
        V=vocab,
        part_columns=columns,
        stride_t=teacher.stride(0) // align,
        stride_s=student.stride(0) // align,
        ALIGN=align,
        N=N_SUMS,
        BR=config.BR,
        BV=config.BV,
        PTX=speaks_ptx(family),
    )
    return Launch(divergence_sums, (count, parts), args, options(config)), sums, index
