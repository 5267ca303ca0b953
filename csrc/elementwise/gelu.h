// GELU, x Phi(x) with the distribution function Phi of the normal distribution, and its approximation by tanh
// (Hendrycks and Gimpel 2016, arXiv:1606.08415). Included after simd/tier.h; local to the including translation unit.
#pragma once

namespace klfast {
namespace {

// Phi(-|x|) = t p(t) e^(-x^2 / 2) with t = 1 / (1 + c |x|), and Phi(x) = 1 - Phi(-x): Abramowitz and Stegun 1964,
// 26.2.17, whose error is below 7.5e-8, about that of a float's rounding.
inline Vec gelu(Vec x) {
    const Vec t = wide_quotient(set(1.0f), fma(set(-0.23164189f), negative_abs(x), set(1.0f)));
    Vec p = set(0.530702715f);
    p = fma(p, t, set(-0.726576014f));
    p = fma(p, t, set(0.710706871f));
    p = fma(p, t, set(-0.142248368f));
    p = fma(p, t, set(0.127414796f));
    const Vec tail = t * p * exp(set(-0.5f) * x * x);
    return x * select_less(x, set(0.0f), tail, set(1.0f) - tail);
}

// x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is 0.5 x (1 + tanh(...)).
inline Vec gelu_tanh(Vec x) {
    const Vec inner = x * fma(x * x, set(0.044715f * 1.5957691216f), set(1.5957691216f));
    return x * sigmoid(inner);
}

}  // namespace
}  // namespace klfast
