"""Contribution of one vocabulary entry to the sums of csrc/divergence/token_state.h, which derives the algebra.

The polynomials are those of csrc/divergence/vector_loops.h. Sums of one row, in the order in which the kernels store
them:

    mu_0 .. mu_8, k1, k2, j, q, sum a^2, sum (b - a)^2, max a, max b, reference

This is struct Part of csrc/divergence/divergence.h. Exponentials are relative to the reference, which is at least about
the largest of a and b - anchor, and use each model's own logits: b - a does not determine b where a is huge. No term of
k1, k2 or j is negative, and none is a difference of larger ones, so a KL of 1e-8 nats keeps its digits in float32.
"""

import triton
import triton.language as tl

N_SUMS = 18


@triton.jit
def exponential(x, PTX: tl.constexpr):
    """Return e^x, 0 below float32's normal range, for which tl.exp would compile to twice the code."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """Return 1 / x for a normal x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def logarithm(x, PTX: tl.constexpr):
    """Return log(x) for x between 1 and 2, to 2e-7."""
    if PTX:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log(x)


@triton.jit
def expm1_negative(x, ALL_SMALL: tl.constexpr, PTX: tl.constexpr):
    """Return e^x - 1 for x <= 0, to a relative error of 2e-7; ALL_SMALL: no x is below -0.5."""
    small = x if ALL_SMALL else tl.maximum(x, -0.5)
    poly = small * (1.0 / 362880.0) + 1.0 / 40320.0
    poly = poly * small + 1.0 / 5040.0
    poly = poly * small + 1.0 / 720.0
    poly = poly * small + 1.0 / 120.0
    poly = poly * small + 1.0 / 24.0
    poly = poly * small + 1.0 / 6.0
    poly = poly * small + 0.5
    near = small + small * small * poly
    return near if ALL_SMALL else tl.where(x > -0.5, near, exponential(x, PTX) - 1.0)


@triton.jit
def divergence_terms(a, b, anchor, reference, valid, ALL_NEAR: tl.constexpr, PTX: tl.constexpr):
    """Return (W, u, k1, k2, j, q) of logits a and b, float32; valid is 1.0, or 0.0 for an entry that does not count.

    W u^k is the term of mu_k. ALL_NEAR: each b - a is within 0.5 of the anchor.
    """
    x = (b - a - anchor) * valid
    y = tl.abs(x)
    less_one = expm1_negative(-y, ALL_NEAR, PTX)
    e = less_one + 1.0
    t = -less_one * reciprocal(e + 1.0, PTX)  # tanh(y / 2)
    t2 = t * t
    w = exponential(tl.maximum(a - reference, b - anchor - reference), PTX) * (e + 1.0) * valid
    quarter = 0.25 * y

    poly = t2 * 1.22889162e-1 + 1.42402410e-1
    poly = poly * t2 + 2.00005580e-1
    poly = poly * t2 + 3.33333320e-1
    rest = t * t2 * poly  # atanh(t) - t
    poly = t2 * 9.63774e-3 + 1.663943e-2
    poly = poly * t2 + 4.166700e-2
    poly = poly * t2 + 0.25
    mixture = t2 * poly  # t y / 4 - log cosh(y / 2) / 2
    if not ALL_NEAR:
        near = y < 0.5
        rest = tl.where(near, rest, 0.5 * y - t)
        mixture = tl.where(near, mixture, quarter * (t - 1.0) + 0.5 * (0.69314718 - logarithm(1.0 + e, PTX)))

    negative = x < 0
    u = tl.where(negative, -t, t)
    rest = tl.where(negative, -rest, rest)
    k1 = w * (t2 + (u - 1.0) * rest)
    k2 = w * (t2 + (u + 1.0) * rest)
    q = 0.5 * w * (1.0 + u) * (0.25 * x - t * quarter + mixture)
    return w, u, k1, k2, w * mixture, q


@triton.jit
def store_sums(p, mu0, mu1, mu2, mu3, mu4, mu5, mu6, mu7, mu8, k1, k2, j, q, a2, d2, max_a, max_b, reference, mask):
    """Store the sums of rows, each of p's shape, at p, p + 1 ... p + N_SUMS - 1."""
    tl.store(p, mu0, mask=mask)
    tl.store(p + 1, mu1, mask=mask)
    tl.store(p + 2, mu2, mask=mask)
    tl.store(p + 3, mu3, mask=mask)
    tl.store(p + 4, mu4, mask=mask)
    tl.store(p + 5, mu5, mask=mask)
    tl.store(p + 6, mu6, mask=mask)
    tl.store(p + 7, mu7, mask=mask)
    tl.store(p + 8, mu8, mask=mask)
    tl.store(p + 9, k1, mask=mask)
    tl.store(p + 10, k2, mask=mask)
    tl.store(p + 11, j, mask=mask)
    tl.store(p + 12, q, mask=mask)
    tl.store(p + 13, a2, mask=mask)
    tl.store(p + 14, d2, mask=mask)
    tl.store(p + 15, max_a, mask=mask)
    tl.store(p + 16, max_b, mask=mask)
    tl.store(p + 17, reference, mask=mask)
