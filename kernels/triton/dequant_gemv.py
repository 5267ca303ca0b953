"""y = x (q - z)^T s for one row of x, without matrix instructions: only reading the weight once matters.

A program takes BN rows of the weight and a part of K; parts go to a float32 buffer [parts, N] that ``split_sum`` sums
in a fixed order. Sums run elementwise over tiles, and across threads once at the end.
"""

from klfast.kernels.dequant_common import BLOCK_EACH, ROW, centred, load_scale, load_tile, load_zero

import triton
import triton.language as tl


@triton.jit
def dequant_gemv(
    x_ptr,  # float [n_blocks * BLOCK]
    w_ptr,  # uint8 [tiles, N, BLOCK], as load_tile reads them in n_tiles turns
    s_ptr,  # float [G, N]
    z_ptr,  # uint8 [G, N] or None
    bias_ptr,  # float [N] or None; only without parts
    y_ptr,  # [N], or float32 [parts, N]
    N,
    n_tiles,
    n_blocks,
    group_blocks,
    tiles_per_part,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    PTX: tl.constexpr,
):
    """Compute BN elements of y, or of a part of K."""
    i_part = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_row = tl.minimum(o_n, N - 1)  # [BN]
    o_k = tl.arange(0, BLOCK)
    p_w = w_ptr + o_row[:, None].to(tl.int64) * BLOCK + o_k[None, :]  # [BN, BLOCK]
    zero = load_zero(z_ptr, i_part * 0, N, o_row, BITS)
    acc = tl.zeros((BN, BLOCK), dtype=tl.float32)
    for i_tile in range(i_part * tiles_per_part, tl.minimum((i_part + 1) * tiles_per_part, n_tiles)):
        b_w = load_tile(p_w, i_tile, n_blocks, N, BLOCK, BITS)  # [BN, BLOCK]
        i_block = i_tile * 2 if BITS == 4 else i_tile
        i_group = i_block // group_blocks
        if SCALES != ROW and z_ptr is not None:
            zero = load_zero(z_ptr, i_group, N, o_row, BITS)
        b_x = tl.load(x_ptr + i_block * BLOCK + o_k).to(tl.float32)  # [BLOCK]
        part = centred(b_w, zero[:, None], 0, tl.float32, BITS, PTX) * b_x[None, :]
        if BITS == 4:
            i_next = tl.minimum(i_block + 1, n_blocks - 1)  # the last of an odd number of blocks pairs with zeros
            if SCALES == BLOCK_EACH:
                acc += part * load_scale(s_ptr, i_group, N, o_row)[:, None]
                i_group = i_next // group_blocks
                if z_ptr is not None:
                    zero = load_zero(z_ptr, i_group, N, o_row, BITS)
                part = tl.zeros((BN, BLOCK), dtype=tl.float32)
            b_x = tl.load(x_ptr + i_next * BLOCK + o_k).to(tl.float32)
            part += centred(b_w, zero[:, None], 1, tl.float32, BITS, PTX) * b_x[None, :]
        acc += part if SCALES == ROW else part * load_scale(s_ptr, i_group, N, o_row)[:, None]
    y = tl.sum(acc, axis=1)  # [BN]
    if SCALES == ROW:
        y *= load_scale(s_ptr, i_part * 0, N, o_row)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o_row).to(tl.float32)
    tl.store(y_ptr + i_part.to(tl.int64) * N + o_n, y.to(y_ptr.dtype.element_ty), mask=o_n < N)


@triton.jit(do_not_specialize=["PARTS"])  # which follows from M: one program serves prompts of all lengths
def split_sum(part_ptr, bias_ptr, y_ptr, M, N, PARTS, BN: tl.constexpr):
    """Write bias [N] (or None) plus the sum of float32 [PARTS, M, N], in order, to y [M, N]."""
    i_m = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < N
    total = tl.zeros((BN,), dtype=tl.float32)
    for i_part in range(PARTS):
        total += tl.load(part_ptr + (i_part * M + i_m) * N + o_n, mask=m_n, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_m * N + o_n, total.to(y_ptr.dtype.element_ty), mask=m_n)
