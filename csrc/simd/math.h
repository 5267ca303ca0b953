// Elementary functions over Vec, included by simd/floats_avx2.h and simd/floats_avx512.h.
//
// exp:      e^x = 2^n e^r, n = round(x log2 e), |r| <= ln 2 / 2; e^r by a minimax polynomial of degree 6 with p(0) = 1,
//           relative error 4e-9. Below 2 ulp in all where the result is a normal number (tests/ops/test_simd_math.py);
//           from 2^127.5 on it may be infinite, as that of exp2.
// expm1:    for x <= 0 only: 2^n (e^r - 1) + (2^n - 1), with e^r - 1 = r + r^2 q(r), q of degree 3:
//           relative error 5e-7.
// exp2:     likewise without the reduction by ln 2, degree 5, 2^0 = 1 exactly, relative error 1.1e-7 and a rounding.
//           The scan takes exp(dt A) as exp2(dt (A log2 e)), where the exponent's roundings add |dt A| 2^-23: an
//           absolute error below 2^-22 wherever dt A <= 0.
// softplus: max(x, 0) + log1p(e), e = e^-|x|; log1p(e) = e l(e), l of degree 9 with relative error 5e-9.
// silu:     x / (1 + e^-x).
// sigmoid:  1 / (1 + e^-x).
// Infinities give what these expressions give: exp2 and exp 0 and infinity, softplus 0 and infinity, silu(-inf) a NaN.
#pragma once

#include "core/numbers.h"

namespace klfast {
namespace {

inline Vec exp2(Vec x) {
    x = within_exponents(x);
    const Vec n = round(x), r = x - n;
    Vec p = fma(set(0x1.5bba1ap-10f), r, set(0x1.3cea88p-7f));
    p = fma(p, r, set(0x1.c6b752p-5f));
    p = fma(p, r, set(0x1.ebf9bcp-3f));
    p = fma(p, r, set(0x1.62e42ap-1f));
    return scale_within(fma(p, r, set(1.0f)), n);
}

inline Vec exp(Vec x) {
    x = min(max(x, set(-104.0f)), set(89.0f));  // the reduction of an infinity would be a NaN
    const Vec n = round(x * set(kLog2e));
    const Vec r = fma(n, set(0x1.05c610p-29f), fma(n, set(-0x1.62e430p-1f), x));
    Vec p = fma(set(0x1.6a23d2p-10f), r, set(0x1.123a20p-7f));
    p = fma(p, r, set(0x1.5558f2p-5f));
    p = fma(p, r, set(0x1.555492p-3f));
    p = fma(p, r, set(0x1.fffffcp-2f));
    p = fma(p, r, set(1.0f));
    return scale(fma(p, r, set(1.0f)), n);
}

inline Vec expm1(Vec x) {
    x = max(x, set(-87.0f));
    const Vec n = round(x * set(kLog2e));
    const Vec r = fma(n, set(-0x1.62e430p-1f), x);  // ln 2 to 2e-9 will do: |n| grows only as the result nears -1
    Vec q = fma(set(8.37287e-3f), r, set(4.187507e-2f));
    q = fma(q, r, set(1.6666479e-1f));
    q = fma(q, r, set(4.999938e-1f));
    const Vec power = scale(set(1.0f), n);
    return fma(power, fma(r * r, q, r), power - set(1.0f));
}

inline Vec softplus(Vec x) {
    const Vec e = exp(negative_abs(x));
    Vec l = fma(set(-0x1.a9336cp-9f), e, set(0x1.453f12p-6f));
    l = fma(l, e, set(-0x1.d29cccp-5f));
    l = fma(l, e, set(0x1.b25362p-4f));
    l = fma(l, e, set(-0x1.397562p-3f));
    l = fma(l, e, set(0x1.92f696p-3f));
    l = fma(l, e, set(-0x1.ff0f88p-3f));
    l = fma(l, e, set(0x1.554c80p-2f));
    l = fma(l, e, set(-0x1.ffffbep-2f));
    l = fma(l, e, set(1.0f));
    return fma(l, e, max(x, set(0.0f)));
}

inline Vec silu(Vec x) { return wide_quotient(x, set(1.0f) + exp(set(0.0f) - x)); }
inline Vec sigmoid(Vec x) { return wide_quotient(set(1.0f), set(1.0f) + exp(set(0.0f) - x)); }

}  // namespace
}  // namespace klfast
