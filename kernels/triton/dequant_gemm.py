"""y = x (q - z)^T s with matrix instructions (DPAS on XPU; HMMA, IMMA or warp-group MMA on CUDA).

The weight is the left operand: it is made in registers, where warp-group MMA takes its left operand from, and a short x
leaves no lanes of the instruction idle. The differences q - z are whole numbers that float16 and bfloat16 hold exactly; the
scales multiply float32 sums. float32 x is cut into three bfloat16 parts, which together hold every bit of it, so that it
runs on matrix instructions too and no product is rounded. int8 x (activation="int8") has a scale a row and group.
"""

import triton
import triton.language as tl

from klfast.kernels.dequant_common import BLOCK_EACH, ROW, load_scale, load_zero, product


@triton.jit
def _product(stored, zero, b_x, acc, BITS: tl.constexpr, UPCAST: tl.constexpr):
    """acc + (stored - zero) @ b_x: uint8 [BN, BLOCK], float32 [BN], [BLOCK, BM], float32 [BN, BM]."""
    if b_x.dtype != tl.int8:
        return product(b_x, stored, zero[:, None], acc, BITS, UPCAST, 0)
    elif BITS == 4:
        b_w = stored.to(tl.int8) - zero.to(tl.int8)[:, None]
        return acc + tl.dot(b_w, b_x, out_dtype=tl.int32).to(tl.float32)
    else:  # bytes beyond int8 cannot be multiplied: 128 is taken off them, and the rest of the zero point off the sums
        b_w = (stored ^ 0x80).to(tl.int8, bitcast=True)
        sums = tl.dot(b_w, b_x, out_dtype=tl.int32)
        sums -= (zero.to(tl.int32) - 128)[:, None] * tl.sum(b_x.to(tl.int32), axis=0)[None, :]
        return acc + sums.to(tl.float32)


@triton.jit
def _scaled(sums, s_ptr, xs_ptr, i_group, N, o_row, o_m, stride_xs):
    """sums [BN, BM] times the scales of the weight's rows o_row and, of int8 x, its rows o_m in a group."""
    sums *= load_scale(s_ptr, i_group, N, o_row)[:, None]
    if xs_ptr is not None:
        sums *= tl.load(xs_ptr + o_m * stride_xs + i_group)[None, :]
    return sums


@triton.jit
def dequant_gemm(
    x_ptr,  # float or int8 [M, n_blocks * BLOCK], rows stride_xm apart
    xs_ptr,  # float32 [M, G], rows stride_xs apart, for int8 x; else None
    w_ptr,  # uint8 [n_tiles, N, BLOCK]
    s_ptr,  # float [G, N]
    z_ptr,  # uint8 [G, N] or None
    bias_ptr,  # float [N] or None; only without parts
    y_ptr,  # [M, N], or float32 [parts, M, N]
    M, N, n_tiles, n_blocks, group_blocks, tiles_per_part, stride_xm, stride_xs,
    BITS: tl.constexpr, SCALES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    BAND: tl.constexpr,  # tiles of rows of y that pass over the weight together: their x stays in cache
    UPCAST: tl.constexpr,
):
    n_m, n_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_band = tl.program_id(0) // (BAND * n_n)
    in_band = tl.minimum(n_m - i_band * BAND, BAND)
    i_m = i_band * BAND + tl.program_id(0) % (BAND * n_n) % in_band
    i_n = tl.program_id(0) % (BAND * n_n) // in_band
    i_part = tl.program_id(1)

    o_n, o_m = i_n * BN + tl.arange(0, BN), i_m * BM + tl.arange(0, BM)
    o_row = tl.minimum(o_n, N - 1)  # [BN]
    o_col = tl.minimum(o_m, M - 1).to(tl.int64)  # [BM]
    o_k = tl.arange(0, BLOCK)
    p_w = w_ptr + o_row[:, None].to(tl.int64) * BLOCK + o_k[None, :]  # [BN, BLOCK]
    p_x = x_ptr + o_k[:, None] + o_col[None, :] * stride_xm  # [BLOCK, BM]
    zero = load_zero(z_ptr, i_part * 0, N, o_row, BITS)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i_tile in range(i_part * tiles_per_part, tl.minimum((i_part + 1) * tiles_per_part, n_tiles)):
        b_w = tl.load(p_w + tl.cast(i_tile, tl.int64) * N * BLOCK)
        i_block = i_tile * 2 if BITS == 4 else i_tile
        i_group = i_block // group_blocks
        if SCALES != ROW and z_ptr is not None:
            zero = load_zero(z_ptr, i_group, N, o_row, BITS)
        sums = acc if SCALES == ROW else tl.zeros((BN, BM), dtype=tl.float32)
        sums = _product(b_w & 0xF if BITS == 4 else b_w, zero, tl.load(p_x + i_block * BLOCK), sums, BITS, UPCAST)
        if BITS == 4:
            i_next = tl.minimum(i_block + 1, n_blocks - 1)  # of an odd number of blocks, the last pairs with zeros
            if SCALES == BLOCK_EACH:
                acc += _scaled(sums, s_ptr, xs_ptr, i_group, N, o_row, o_col, stride_xs)
                i_group = i_next // group_blocks
                if z_ptr is not None:
                    zero = load_zero(z_ptr, i_group, N, o_row, BITS)
                sums = tl.zeros((BN, BM), dtype=tl.float32)
            sums = _product(b_w >> 4, zero, tl.load(p_x + i_next * BLOCK), sums, BITS, UPCAST)
        acc = sums if SCALES == ROW else acc + _scaled(sums, s_ptr, xs_ptr, i_group, N, o_row, o_col, stride_xs)
    if SCALES == ROW:
        acc = _scaled(acc, s_ptr, xs_ptr, i_part * 0, N, o_row, o_col, stride_xs)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_row).to(tl.float32)[:, None]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)  # [BM, BN]
    p_y = y_ptr + (i_part.to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    tl.store(p_y, y, mask=(o_m < M)[:, None] & (o_n < N)[None, :])
