"""y = x (q - z)^T s with matrix instructions (DPAS on XPU; HMMA, IMMA or warp-group MMA on CUDA).

The weight is the left operand: it is made in registers, where warp-group MMA takes its left operand from, and a short x
leaves no lanes of the instruction idle. The differences q - z are integers that float16 and bfloat16 hold exactly; the
scales multiply float32 sums. float32 x is split into three bfloat16 parts, which together hold all its bits, so that it
runs on matrix instructions too and no product is rounded. int8 x (activation="int8") has a scale per row and group.
"""

from klfast.kernels.dequant_common import BLOCK_EACH, ROW, centred_int8, load_scale, load_tile, load_zero, product

import triton
import triton.language as tl


@triton.jit
def _product(packed, zero, b_x, acc, HALF: tl.constexpr, BITS: tl.constexpr, UPCAST: tl.constexpr, PTX: tl.constexpr):
    """Return acc + (values - zero) @ b_x; packed bytes [BN, BLOCK], zero [BN], b_x [BLOCK, BM], acc [BN, BM]."""
    if b_x.dtype != tl.int8:
        return product(b_x, packed, zero[:, None], acc, HALF, BITS, UPCAST, PTX)
    elif BITS == 4:
        b_w = centred_int8(packed, zero.to(tl.uint8)[:, None], HALF, PTX)
        return acc + tl.dot(b_w, b_x, out_dtype=tl.int32).to(tl.float32)
    else:  # uint8 does not fit int8: subtract 128 from the weights and the remaining zero point from the sums
        b_w = (packed ^ 0x80).to(tl.int8, bitcast=True)
        sums = tl.dot(b_w, b_x, out_dtype=tl.int32)
        sums -= (zero.to(tl.int32) - 128)[:, None] * tl.sum(b_x.to(tl.int32), axis=0)[None, :]
        return acc + sums.to(tl.float32)


@triton.jit
def _group(i_tile, n_blocks, group_blocks, HALF: tl.constexpr, BITS: tl.constexpr):
    """Return the group of a tile's block; the last of an odd number of blocks pairs with zeros."""
    return tl.minimum(i_tile * (8 // BITS) + HALF, n_blocks - 1) // group_blocks


@triton.jit
def _factors(s_ptr, z_ptr, xs_ptr, i_group, N, o_row, o_col, stride_xs, BITS: tl.constexpr):
    """Load a group's scales and zero points of the weight's rows, float32 [BN], and scales [BM] of x, used if int8."""
    x_scale = tl.zeros_like(o_col).to(tl.float32)
    if xs_ptr is not None:
        x_scale = tl.load(xs_ptr + o_col * stride_xs + i_group)
    return load_scale(s_ptr, i_group, N, o_row), load_zero(z_ptr, i_group, N, o_row, BITS), x_scale


@triton.jit
def _scaled(sums, scale, x_scale, s_ptr, xs_ptr, i_group, N, o_row, o_col, stride_xs, READ: tl.constexpr):
    """Multiply sums [BN, BM] by scales [BN] of the weight and, for int8 x, [BM] of x: those given, or READ now."""
    sums *= (load_scale(s_ptr, i_group, N, o_row) if READ else scale)[:, None]
    if xs_ptr is not None:
        sums *= (tl.load(xs_ptr + o_col * stride_xs + i_group) if READ else x_scale)[None, :]
    return sums


@triton.jit
def dequant_gemm(
    x_ptr,  # float or int8 [M, n_blocks * BLOCK], rows stride_xm apart
    xs_ptr,  # float32 [M, G], rows stride_xs apart, for int8 x; else None
    w_ptr,  # uint8 [tiles, N, BLOCK], as load_tile reads them in n_tiles turns
    s_ptr,  # float [G, N]
    z_ptr,  # uint8 [G, N] or None
    bias_ptr,  # float [N] or None; only without parts
    y_ptr,  # [M, N], or float32 [parts, M, N]
    M,
    N,
    n_tiles,
    n_blocks,
    group_blocks,
    tiles_per_part,
    stride_xm,
    stride_xs,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    BAND: tl.constexpr,  # tiles of rows of y that read the weight together: their x stays in cache
    UPCAST: tl.constexpr,
    PTX: tl.constexpr,
    AHEAD: tl.constexpr,  # True if there are registers for another tile's scales
):
    """Compute a tile [BM, BN] of y, or of a part of K."""
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
    first = i_part * tiles_per_part
    end = tl.minimum(first + tiles_per_part, n_tiles)
    # AHEAD: a tile's scales are read during the product before it. A second block in another group has its own.
    start = first * 0 if SCALES == ROW else _group(first, n_blocks, group_blocks, 0, BITS)
    scale, zero, x_scale = _factors(s_ptr, z_ptr, xs_ptr, start, N, o_row, o_col, stride_xs, BITS)
    scale_1, zero_1, x_scale_1 = scale, zero, x_scale
    if AHEAD and SCALES == BLOCK_EACH:
        start = _group(first, n_blocks, group_blocks, 1, BITS)
        scale_1, zero_1, x_scale_1 = _factors(s_ptr, z_ptr, xs_ptr, start, N, o_row, o_col, stride_xs, BITS)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for i_tile in range(first, end):
        b_w = load_tile(p_w, i_tile, n_blocks, N, BLOCK, BITS)
        this, this_zero, this_x = scale, zero, x_scale
        this_1, this_zero_1, this_x_1 = scale_1, zero_1, x_scale_1
        if AHEAD and SCALES != ROW:
            ahead = _group(i_tile + 1, n_blocks, group_blocks, 0, BITS)
            scale, zero, x_scale = _factors(s_ptr, z_ptr, xs_ptr, ahead, N, o_row, o_col, stride_xs, BITS)
        if AHEAD and SCALES == BLOCK_EACH:
            ahead = _group(i_tile + 1, n_blocks, group_blocks, 1, BITS)
            scale_1, zero_1, x_scale_1 = _factors(s_ptr, z_ptr, xs_ptr, ahead, N, o_row, o_col, stride_xs, BITS)
        i_block = i_tile * (8 // BITS)
        i_group = i_block // group_blocks
        if not AHEAD and SCALES != ROW:
            this_zero = load_zero(z_ptr, i_group, N, o_row, BITS)
        sums = acc if SCALES == ROW else tl.zeros((BN, BM), dtype=tl.float32)
        sums = _product(b_w, this_zero, tl.load(p_x + i_block * BLOCK), sums, 0, BITS, UPCAST, PTX)
        if BITS == 4:
            i_next = tl.minimum(i_block + 1, n_blocks - 1)
            if SCALES == BLOCK_EACH:
                acc += _scaled(sums, this, this_x, s_ptr, xs_ptr, i_group, N, o_row, o_col, stride_xs, not AHEAD)
                this, this_zero, this_x = this_1, this_zero_1, this_x_1
                i_group = i_next // group_blocks
                if not AHEAD:
                    this_zero = load_zero(z_ptr, i_group, N, o_row, BITS)
                sums = tl.zeros((BN, BM), dtype=tl.float32)
            sums = _product(b_w, this_zero, tl.load(p_x + i_next * BLOCK), sums, 1, BITS, UPCAST, PTX)
        acc = (
            sums
            if SCALES == ROW
            else acc + _scaled(sums, this, this_x, s_ptr, xs_ptr, i_group, N, o_row, o_col, stride_xs, not AHEAD)
        )
    if SCALES == ROW:
        acc = _scaled(acc, scale, x_scale, s_ptr, xs_ptr, first * 0, N, o_row, o_col, stride_xs, False)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_row).to(tl.float32)[:, None]
    y = tl.trans(acc).to(y_ptr.dtype.element_ty)  # [BM, BN]
    p_y = y_ptr + (i_part.to(tl.int64) * M + o_m)[:, None] * N + o_n[None, :]
    tl.store(p_y, y, mask=(o_m < M)[:, None] & (o_n < N)[None, :])
