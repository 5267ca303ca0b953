"""int8 activations: x rounded per row and group of the weight, symmetric, like ``reference.fake_quantize_rows``."""

import triton
import triton.language as tl


@triton.jit
def quantize_rows(
    x_ptr,  # float [M, K], rows stride_xm apart; K is n_chunks * CHUNK per group, the last may be shorter
    q_ptr,  # int8 [M, K]
    s_ptr,  # float32 [M, G]
    M,
    K,
    G,
    n_chunks,
    stride_xm,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Round one group of BM rows."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_row = tl.minimum(o_m, M - 1).to(tl.int64)
    i_group = tl.program_id(1)
    o_k = i_group.to(tl.int64) * n_chunks * CHUNK + tl.arange(0, CHUNK)
    p_x = x_ptr + o_row[:, None] * stride_xm + o_k[None, :]  # [BM, CHUNK]
    p_q = q_ptr + o_row[:, None] * K + o_k[None, :]
    n_here = tl.minimum(n_chunks, K // CHUNK - i_group * n_chunks)

    # Compare magnitudes by their bits, as integers: a NaN is the largest and is not lost.
    bits = tl.zeros((BM,), dtype=tl.int32)
    for i in range(n_here):
        b_x = tl.load(p_x + i * CHUNK).to(tl.float32)
        bits = tl.maximum(bits, tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full((BM,), 127.0, tl.float32))
    scale = tl.where(bits >= 0x7F800000, float("nan"), scale)  # also for infinities: minimum and maximum lose NaNs
    smallest: tl.constexpr = 1.1754943508222875e-38
    inverse = tl.where(scale >= smallest, tl.div_rn(tl.full((BM,), 1.0, tl.float32), tl.maximum(scale, smallest)), 0.0)
    tl.store(s_ptr + o_m.to(tl.int64) * G + i_group, scale, mask=o_m < M)

    for i in range(n_here):
        b_x = tl.load(p_x + i * CHUNK).to(tl.float32) * inverse[:, None]
        b_x = tl.minimum(tl.maximum(b_x, -127.0), 127.0)
        nearest = (b_x + 12582912.0) - 12582912.0  # half to even: 1.5 * 2^23 leaves no bits for a fraction
        tl.store(p_q + i * CHUNK, nearest.to(tl.int8), mask=(o_m < M)[:, None])
