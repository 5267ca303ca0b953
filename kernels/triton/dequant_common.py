"""Shared parts of the kernels with quantized weights: conversion of values, products, and the scales of a tile.

Weights come in ``Layout.TILED``: a tile is uint8 [N, BLOCK]; for INT4 its low nibbles are one block of K and its high
nibbles the next. INT6 is assembled from two such tiles, block by block, and then handled as INT8 (``load_tile``). All
conversions are exact: stored values and zero points are integers of at most 8 bits, as is their difference apart from
its sign.
"""

import triton
import triton.language as tl

# SCALES: how a kernel applies the scales of a row.
ROW = tl.constexpr(0)  # one group per row: once, at the end
TILE = tl.constexpr(1)  # a tile lies in one group: once per tile
BLOCK_EACH = tl.constexpr(2)  # the two blocks of an INT4 tile may lie in two groups


# PTX that unpacks four packed bytes at once: t gets one value per byte, then a `prmt` per register puts the bytes below
# the constant of ``centred``. LLVM unpacks byte by byte, at three times the instructions. {} is the operand.
LOW, HIGH, WHOLE = "and.b32 t, {}, 0x0F0F0F0F;", "shr.b32 t, {}, 4; and.b32 t, t, 0x0F0F0F0F;", "mov.b32 t, {};"


def _ptx(take: str, operand: str, *lines: str) -> tl.constexpr:
    """Return PTX that makes t from the operand by ``take``, and the results $0, $1 ... from t by ``lines``."""
    return tl.constexpr("{ .reg .b32 t; " + " ".join((take.format(operand), *lines)) + " }")


def _ptx_16(take: str, constant: str) -> tl.constexpr:
    return _ptx(take, "$2", f"prmt.b32 $0, t, {constant}, 0x4140;", f"prmt.b32 $1, t, {constant}, 0x4342;")


def _ptx_32(take: str) -> tl.constexpr:
    return _ptx(take, "$4", *(f"prmt.b32 ${i}, t, 0x4B000000, 0x744{i};" for i in range(4)))


def _ptx_int8(take: str) -> tl.constexpr:
    """Subtract the zero points in $2 bytewise: upper bits set meanwhile keep bytes from borrowing from the next."""
    return _ptx(take, "$1", "or.b32 t, t, 0x80808080;", "sub.u32 t, t, $2;", "xor.b32 $0, t, 0x80808080;")


LOW_F16, HIGH_F16, WHOLE_F16 = (_ptx_16(take, "0x64646464") for take in (LOW, HIGH, WHOLE))
LOW_BF16, HIGH_BF16 = (_ptx_16(take, "0x43434343") for take in (LOW, HIGH))
LOW_F32, HIGH_F32, WHOLE_F32 = (_ptx_32(take) for take in (LOW, HIGH, WHOLE))
LOW_INT8, HIGH_INT8 = (_ptx_int8(take) for take in (LOW, HIGH))
TO_16, TO_32 = tl.constexpr("=r,=r,r"), tl.constexpr("=r,=r,=r,=r,r")


@triton.jit
def load_tile(p_w, i_tile, n_blocks, N, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Load uint8 at p_w in a tile of INT4 or INT8; for INT6 a block's values: four bits of one tile, two of another."""
    if BITS == 6:
        low = tl.load(p_w + tl.cast(i_tile // 2, tl.int64) * N * BLOCK)
        high = tl.load(p_w + tl.cast((n_blocks + 1) // 2 + i_tile // 4, tl.int64) * N * BLOCK)
        low = (low >> tl.cast(i_tile % 2 * 4, tl.uint8)) & 0xF
        return low | (((high >> tl.cast(i_tile % 4 * 2, tl.uint8)) & 3) << 4)
    else:
        return tl.load(p_w + tl.cast(i_tile, tl.int64) * N * BLOCK)


@triton.jit
def stored_values(packed, HALF: tl.constexpr, BITS: tl.constexpr):
    """Return uint8: for INT4 the low nibbles of packed bytes, with HALF 1 the high ones; else the bytes."""
    if BITS != 4:
        return packed
    else:
        return packed >> 4 if HALF else packed & 0xF


@triton.jit
def centred(packed, zero, HALF: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Return ``stored_values`` (uint8) minus zero (float32), broadcast, in DTYPE.

    The integer goes into the low bits of the significand of 2^10 (float16), 2^7 (bfloat16) or 2^23 (float32). This
    needs no conversion instructions, which run at a fraction of the rate of additions on GPUs.
    """
    if DTYPE == tl.float16:
        if PTX:
            code: tl.constexpr = WHOLE_F16 if BITS != 4 else HIGH_F16 if HALF else LOW_F16
            raised = tl.inline_asm_elementwise(code, TO_16, [packed], dtype=tl.float16, is_pure=True, pack=4)
        else:
            raised = (stored_values(packed, HALF, BITS).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        return raised - (zero + 1024.0).to(tl.float16)
    elif DTYPE == tl.bfloat16 and BITS == 4:
        if PTX:
            code: tl.constexpr = HIGH_BF16 if HALF else LOW_BF16
            raised = tl.inline_asm_elementwise(code, TO_16, [packed], dtype=tl.bfloat16, is_pure=True, pack=4)
        else:
            raised = (stored_values(packed, HALF, BITS).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        return raised - (zero + 128.0).to(tl.bfloat16)
    else:
        if PTX:
            code: tl.constexpr = WHOLE_F32 if BITS != 4 else HIGH_F32 if HALF else LOW_F32
            raised = tl.inline_asm_elementwise(code, TO_32, [packed], dtype=tl.float32, is_pure=True, pack=4)
        else:
            raised = (stored_values(packed, HALF, BITS).to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True)
        return (raised - (zero + 8388608.0)).to(DTYPE)


@triton.jit
def centred_int8(packed, zero, HALF: tl.constexpr, PTX: tl.constexpr):
    """Return the values of an INT4 weight minus zero (uint8) in int8."""
    if PTX:
        code: tl.constexpr = HIGH_INT8 if HALF else LOW_INT8
        return tl.inline_asm_elementwise(code, "=r,r,r", [packed, zero], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return stored_values(packed, HALF, 4).to(tl.int8) - zero.to(tl.int8)


@triton.jit
def load_zero(z_ptr, group, N, o_n, BITS: tl.constexpr):
    """Load zero points of rows o_n in a group, float32 like o_n; for symmetric weights the middle of the range."""
    if z_ptr is None:
        middle: tl.constexpr = 1 << (BITS - 1)
        return tl.full(o_n.shape, middle, tl.float32)
    else:
        return tl.load(z_ptr + tl.cast(group, tl.int64) * N + o_n).to(tl.float32)


@triton.jit
def load_scale(s_ptr, group, N, o_n):
    """Load scales of rows o_n in a group, float32 like o_n."""
    return tl.load(s_ptr + tl.cast(group, tl.int64) * N + o_n).to(tl.float32)


@triton.jit
def top_bits(x):
    """Return float32 x with all but its upper 16 bits cleared: the bits that a bfloat16 holds."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def multiply(b_w, b_x, acc):
    """Return acc + b_w @ b_x."""
    return tl.dot(b_w, b_x, acc, input_precision="ieee")


@triton.jit
def float_product(b_x, b_w, acc, UPCAST: tl.constexpr, IN_PARTS: tl.constexpr):
    """Return acc plus the product with a float head; IN_PARTS splits operands into three bfloat16 parts, exactly."""
    if IN_PARTS:
        DTYPE: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
        b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        x_high, w_high = top_bits(b_x), top_bits(b_w)
        x_middle, w_middle = top_bits(b_x - x_high), top_bits(b_w - w_high)
        x_low, w_low = (b_x - x_high - x_middle).to(DTYPE), (b_w - w_high - w_middle).to(DTYPE)
        x_high, w_high, x_middle, w_middle = x_high.to(DTYPE), w_high.to(DTYPE), x_middle.to(DTYPE), w_middle.to(DTYPE)
        acc = multiply(w_low, x_low, acc)
        acc = multiply(w_middle, x_low, multiply(w_low, x_middle, acc))
        acc = multiply(w_high, x_low, multiply(w_middle, x_middle, multiply(w_low, x_high, acc)))
        acc = multiply(w_high, x_middle, multiply(w_middle, x_high, acc))
        return multiply(w_high, x_high, acc)
    else:
        if UPCAST:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        return multiply(b_w, b_x, acc)


@triton.jit
def product(b_x, packed, zero, acc, HALF: tl.constexpr, BITS: tl.constexpr, UPCAST: tl.constexpr, PTX: tl.constexpr):
    """Return acc plus a quantized weight, packed bytes and float32 zero points as in ``centred``, times x.

    float32 x is split into three bfloat16 parts, which together hold all its bits: no product is rounded.
    """
    if b_x.dtype == tl.float32:
        DTYPE: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
        b_w = centred(packed, zero, HALF, DTYPE, BITS, PTX)
        high = top_bits(b_x)
        rest = tl.where(b_x == high, 0.0, b_x - high)  # an infinity has no rest
        middle = top_bits(rest)
        acc = multiply(b_w, (rest - middle).to(DTYPE), acc)
        return multiply(b_w, high.to(DTYPE), multiply(b_w, middle.to(DTYPE), acc))
    else:
        DTYPE: tl.constexpr = tl.float32 if UPCAST and b_x.dtype == tl.bfloat16 else b_x.dtype
        return multiply(centred(packed, zero, HALF, DTYPE, BITS, PTX), b_x.to(DTYPE), acc)
