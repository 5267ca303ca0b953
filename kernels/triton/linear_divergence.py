"""linear_divergence on Intel GPUs: both heads' products and logit_divergence's sums in one kernel.

The logits stay in registers. NVIDIA GPUs have much faster products of their own, and a cache that holds the logits of
some thousand vocabulary entries: there the backend computes these and sums them with logit_divergence's kernel.

A program takes BM tokens and a part of the vocabulary, BN entries at a time: it computes the teacher's logits, the
student's, then their terms in each token's sums (divergence_terms.py). A head is a float matrix or a quantized one
(``Layout.TILED``), multiplied as in dequant_gemm.py. Tokens are columns of the products, of which a thread holds few,
so that their 19 sums take few registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from klfast.kernels.dequant_common import float_product, load_scale, load_tile, load_zero, product
from klfast.kernels.dequant_matmul import Weight
from klfast.kernels.divergence_terms import N_SUMS, divergence_terms, store_sums
from klfast.kernels.launch import INTERPRETED, Launch, cdiv, options

import triton
import triton.language as tl


@triton.jit
def head_logits(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    o_token,
    o_v,
    V,
    n_tiles,
    n_blocks,
    group_blocks,
    stride_x,
    stride_w,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Compute logits of vocabulary entries o_v for tokens o_token (int64): float32 [BN, BM].

    A tile's BLOCK features are processed STEP at a time.
    """
    o_k = tl.arange(0, STEP)
    p_x = x_ptr + o_token[None, :] * stride_x + o_k[:, None]
    row = BLOCK if BITS else stride_w
    p_w = w_ptr + o_v[:, None].to(tl.int64) * row + o_k[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i_step in range(0, n_tiles * (BLOCK // STEP)):
        if BITS == 0:
            acc = float_product(tl.load(p_x + i_step * STEP), tl.load(p_w + i_step * STEP), acc, UPCAST, IN_PARTS)
        else:
            i_tile, o_step = i_step // (BLOCK // STEP), i_step % (BLOCK // STEP) * STEP
            b_w = load_tile(p_w + o_step, i_tile, n_blocks, V, BLOCK, BITS)
            for i_half in tl.static_range(8 // BITS):
                i_block = tl.minimum(i_tile * (8 // BITS) + i_half, n_blocks - 1)  # a missing second block is zeros
                i_group = i_block // group_blocks
                zero = load_zero(z_ptr, i_group, V, o_v, BITS)[:, None]
                sums = product(
                    tl.load(p_x + i_block * BLOCK + o_step), b_w, zero, tl.zeros_like(acc), i_half, BITS, UPCAST, False
                )
                acc += sums * load_scale(s_ptr, i_group, V, o_v)[:, None]
    return acc


@triton.jit
def linear_divergence_sums(
    t_x_ptr,
    t_w_ptr,
    t_s_ptr,
    t_z_ptr,  # the teacher's hidden states [n_teacher, H] and head, as in head_logits
    s_x_ptr,
    s_w_ptr,
    s_s_ptr,
    s_z_ptr,  # the student's, [S * n_teacher, H']
    rows_ptr,  # int64 [R], the student's tokens to compare; None for all
    anchor_ptr,  # float32 [R]
    sums_ptr,  # float32 [R, parts, N]
    index_ptr,  # int32 [R, parts, 2]
    R,
    n_teacher,
    V,
    part_columns,
    t_tiles,
    t_blocks,
    t_group_blocks,
    t_stride_x,
    t_stride_w,
    s_tiles,
    s_blocks,
    s_group_blocks,
    s_stride_x,
    s_stride_w,
    T_BITS: tl.constexpr,
    T_BLOCK: tl.constexpr,
    T_STEP: tl.constexpr,
    T_UPCAST: tl.constexpr,
    T_IN_PARTS: tl.constexpr,
    S_BITS: tl.constexpr,
    S_BLOCK: tl.constexpr,
    S_STEP: tl.constexpr,
    S_UPCAST: tl.constexpr,
    S_IN_PARTS: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sum the divergence terms of BM tokens over a part of the vocabulary."""
    i_part = tl.program_id(1)
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    o_row = tl.minimum(o_r, R - 1).to(tl.int64)  # [BM]
    o_token = o_row if rows_ptr is None else tl.load(rows_ptr + o_row)
    o_teacher = o_token % n_teacher
    anchor = tl.load(anchor_ptr + o_row)
    first = i_part * part_columns
    last = tl.minimum(first + part_columns, V)
    mu0 = tl.zeros((BM,), tl.float32)
    mu1, mu2, mu3, mu4, mu5, mu6, mu7, mu8 = mu0, mu0, mu0, mu0, mu0, mu0, mu0, mu0
    k1, k2, j, q, a2, d2 = mu0, mu0, mu0, mu0, mu0, mu0
    reference = tl.full((BM,), -float("inf"), tl.float32)
    max_a, max_b = reference, reference
    at_a = tl.zeros((BM,), tl.int32)
    at_b = at_a
    for start in range(first, last, BN):
        o_v = tl.minimum(start + tl.arange(0, BN), last - 1)
        a = head_logits(
            t_x_ptr,
            t_w_ptr,
            t_s_ptr,
            t_z_ptr,
            o_teacher,
            o_v,
            V,
            t_tiles,
            t_blocks,
            t_group_blocks,
            t_stride_x,
            t_stride_w,
            T_BITS,
            BM,
            BN,
            T_BLOCK,
            T_STEP,
            T_UPCAST,
            T_IN_PARTS,
        )
        b = head_logits(
            s_x_ptr,
            s_w_ptr,
            s_s_ptr,
            s_z_ptr,
            o_token,
            o_v,
            V,
            s_tiles,
            s_blocks,
            s_group_blocks,
            s_stride_x,
            s_stride_w,
            S_BITS,
            BM,
            BN,
            S_BLOCK,
            S_STEP,
            S_UPCAST,
            S_IN_PARTS,
        )
        valid = tl.where(start + tl.arange(0, BN) < last, 1.0, 0.0)[:, None]
        top_a, top_b = tl.max(a, axis=0), tl.max(b, axis=0)  # [BM]
        needed = tl.maximum(reference, tl.maximum(top_a, top_b - anchor))
        shrink = tl.exp(reference - needed)
        reference = needed
        w, u, k1_term, k2_term, j_term, q_term = divergence_terms(
            a, b, anchor[None, :], reference[None, :], valid, False, False
        )
        k1, k2 = k1 * shrink + tl.sum(k1_term, axis=0), k2 * shrink + tl.sum(k2_term, axis=0)
        j, q = j * shrink + tl.sum(j_term, axis=0), q * shrink + tl.sum(q_term, axis=0)
        mu0 = mu0 * shrink + tl.sum(w, axis=0)
        w *= u
        mu1 = mu1 * shrink + tl.sum(w, axis=0)
        w *= u
        mu2 = mu2 * shrink + tl.sum(w, axis=0)
        w *= u
        mu3 = mu3 * shrink + tl.sum(w, axis=0)
        w *= u
        mu4 = mu4 * shrink + tl.sum(w, axis=0)
        w *= u
        mu5 = mu5 * shrink + tl.sum(w, axis=0)
        w *= u
        mu6 = mu6 * shrink + tl.sum(w, axis=0)
        w *= u
        mu7 = mu7 * shrink + tl.sum(w, axis=0)
        mu8 = mu8 * shrink + tl.sum(w * u, axis=0)
        d = (b - a) * valid
        a2, d2 = a2 + tl.sum(a * a * valid, axis=0), d2 + tl.sum(d * d, axis=0)
        entry = o_v[:, None]
        here_a = tl.min(tl.where(a == top_a[None, :], entry, 2147483647), axis=0)
        here_b = tl.min(tl.where(b == top_b[None, :], entry, 2147483647), axis=0)
        at_a, at_b = tl.where(top_a > max_a, here_a, at_a), tl.where(top_b > max_b, here_b, at_b)
        max_a, max_b = tl.maximum(max_a, top_a), tl.maximum(max_b, top_b)

    m_r = o_r < R
    cell = o_row * tl.num_programs(1) + i_part
    store_sums(
        sums_ptr + cell * N,
        mu0,
        mu1,
        mu2,
        mu3,
        mu4,
        mu5,
        mu6,
        mu7,
        mu8,
        k1,
        k2,
        j,
        q,
        a2,
        d2,
        max_a,
        max_b,
        reference,
        m_r,
    )
    tl.store(index_ptr + cell * 2, at_a, mask=m_r)
    tl.store(index_ptr + cell * 2 + 1, at_b, mask=m_r)


@dataclass(frozen=True)
class Config:
    """BM tokens by BN entries of the vocabulary; parts of at least ``part`` entries."""

    BM: int
    BN: int
    part: int
    num_warps: int
    num_stages: int = 1
    grf_mode: str | None = None


# By whether an operand is float32, which takes more registers.
CONFIGS = {False: Config(16, 64, 2048, 8, grf_mode="256"), True: Config(16, 32, 2048, 8, grf_mode="256")}


@dataclass(frozen=True)
class Side:
    """A model's hidden states, prepared for the kernel, and its head.

    Attributes:
        hidden: [T, K], contiguous rows; K as the head needs it, see ``float_block`` and ``layouts.fill_blocks``.
        head: float [V, K], contiguous rows, or a quantized one.
    """

    hidden: torch.Tensor
    head: torch.Tensor | Weight

    @property
    def is_wide(self) -> bool:
        """True if an operand is float32."""
        head = self.head.dtype if isinstance(self.head, torch.Tensor) else None
        return torch.float32 in (self.hidden.dtype, head)

    def args(self, name: str, is_wide: bool) -> dict:
        """Return the kernel's arguments of this side, prefixed with ``name``; is_wide: either side is.

        UPCAST widens types that the interpreter cannot multiply. float32 times float32 and float16 times bfloat16 use
        three bfloat16 parts each: triton-xpu 3.3 cannot mix products with and without matrix instructions. With such
        parts, of hidden states or head, features go 16 at a time, so that all fit in registers.
        """
        common = {"x_ptr": self.hidden, "stride_x": self.hidden.stride(0)}
        in_parts = bits = 0
        if isinstance(self.head, torch.Tensor):
            in_parts = self.is_wide or self.hidden.dtype != self.head.dtype
            block = 32 if in_parts else float_block(self.hidden.shape[1])
            rest = {
                "w_ptr": self.head,
                "s_ptr": None,
                "z_ptr": None,
                "tiles": self.hidden.shape[1] // block,
                "blocks": 0,
                "group_blocks": 1,
                "stride_w": self.head.stride(0),
            }
        else:
            bits, tiling = self.head.spec.bits, self.head.tiling
            block = tiling.block
            rest = {
                "w_ptr": self.head.packed,
                "s_ptr": self.head.scale,
                "z_ptr": self.head.zero_point,
                "tiles": tiling.turns,
                "blocks": tiling.n_blocks,
                "group_blocks": tiling.group_blocks,
                "stride_w": 0,
            }
        step = 16 if is_wide else block
        constants = {"BITS": bits, "BLOCK": block, "STEP": step, "UPCAST": INTERPRETED, "IN_PARTS": bool(in_parts)}
        return {f"{name}_{key}": value for key, value in (common | rest).items()} | {
            f"{name.upper()}_{key}": value for key, value in constants.items()
        }


def float_block(features: int) -> int:
    """Return how many features of a float head are read at a time; its rows must be a multiple of that."""
    return 64 if features % 64 == 0 else 32


def plan_sums(
    teacher: Side,
    student: Side,
    n_teacher: int,
    vocab: int,
    rows: torch.Tensor | None,
    anchor: torch.Tensor,
    *,
    cores: int,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Plan sums like logit_divergence.plan_sums, from hidden states.

    Token i of the student is compared with token i % n_teacher of the teacher.
    """
    is_wide, count = teacher.is_wide or student.is_wide, anchor.numel()
    config = CONFIGS[is_wide]
    programs = cdiv(count, config.BM)
    parts = max(1, min(cdiv(vocab, config.part), cdiv(2 * cores, max(programs, 1))))
    columns = cdiv(cdiv(vocab, parts), config.BN) * config.BN
    parts = cdiv(vocab, columns)
    sums = torch.empty(count, parts, N_SUMS, device=anchor.device)
    index = torch.empty(count, parts, 2, dtype=torch.int32, device=anchor.device)
    args = dict(
        **teacher.args("t", is_wide),
        **student.args("s", is_wide),
        rows_ptr=rows,
        anchor_ptr=anchor,
        sums_ptr=sums,
        index_ptr=index,
        R=count,
        n_teacher=n_teacher,
        V=vocab,
        part_columns=columns,
        N=N_SUMS,
        BM=config.BM,
        BN=config.BN,
    )
    return Launch(linear_divergence_sums, (programs, parts), args, options(config)), sums, index
