"""What kernels with quantized weights share: the values as numbers, products with them, and which scales a tile has.

Weights come in ``Layout.TILED``: a tile is uint8 [N, BLOCK]; for INT4 its low nibbles are one block of K and its high
nibbles the next. All conversions are exact: stored values and zero points are whole numbers of at most 8 bits, and so is
their difference but for its sign.
"""

import triton
import triton.language as tl

# SCALES: how a kernel applies the scales of a row.
ROW = tl.constexpr(0)  # one group a row: once, at the end
TILE = tl.constexpr(1)  # all of a tile lies in one group: once a tile
BLOCK_EACH = tl.constexpr(2)  # the two blocks of an INT4 tile may lie in two groups


@triton.jit
def centred(stored, zero, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """stored - zero in DTYPE: uint8 and float32, broadcast against each other.

    The integer goes into the low bits of the significand of 2^10 (float16), 2^7 (bfloat16) or 2^23 (float32), which takes
    no conversion instruction: on GPUs they run at a fraction of the rate of additions.
    """
    if DTYPE == tl.float16:
        return (stored.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    elif DTYPE == tl.bfloat16 and BITS == 4:
        return (stored.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    else:
        wide = (stored.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)
        return wide.to(DTYPE)


@triton.jit
def load_zero(z_ptr, group, N, o_n, BITS: tl.constexpr):
    """Zero points of rows o_n in a group, float32 like o_n; of symmetric weights the middle of the range."""
    if z_ptr is None:
        middle: tl.constexpr = 1 << (BITS - 1)
        return tl.full(o_n.shape, middle, tl.float32)
    else:
        return tl.load(z_ptr + tl.cast(group, tl.int64) * N + o_n).to(tl.float32)


@triton.jit
def load_scale(s_ptr, group, N, o_n):
    """Scales of rows o_n in a group, float32 like o_n."""
    return tl.load(s_ptr + tl.cast(group, tl.int64) * N + o_n).to(tl.float32)


@triton.jit
def top_bits(x):
    """float32 x with all but the upper 16 bits cleared: what a bfloat16 holds of it."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def multiply(b_x, b_w, acc, AXIS: tl.constexpr):
    """acc + b_x @ b_w; if AXIS, the weight's rows', is 0, acc + b_w @ b_x."""
    if AXIS:
        return tl.dot(b_x, b_w, acc, input_precision="ieee")
    else:
        return tl.dot(b_w, b_x, acc, input_precision="ieee")


@triton.jit
def product(b_x, stored, zero, acc, BITS: tl.constexpr, UPCAST: tl.constexpr, AXIS: tl.constexpr):
    """acc plus x's product with a quantized weight, stored - zero (uint8 and float32), as in ``multiply``.

    float32 x is cut into three bfloat16 parts, which together hold every bit of it: no product is rounded.
    """
    if b_x.dtype == tl.float32:
        DTYPE: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
        b_w = centred(stored, zero, DTYPE, BITS)
        high = top_bits(b_x)
        middle = top_bits(b_x - high)
        acc = multiply((b_x - high - middle).to(DTYPE), b_w, acc, AXIS)
        return multiply(high.to(DTYPE), b_w, multiply(middle.to(DTYPE), b_w, acc, AXIS), AXIS)
    else:
        DTYPE: tl.constexpr = tl.float32 if UPCAST and b_x.dtype == tl.bfloat16 else b_x.dtype
        return multiply(b_x.to(DTYPE), centred(stored, zero, DTYPE, BITS), acc, AXIS)
