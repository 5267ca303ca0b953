// The vector loops of divergence.h, written once over the Vec of csrc/simd and compiled by each tier. The functions are
// local to the including translation unit, for its flags are its own.
//
// Weights are powers of 2 relative to about the largest, 2^(a log2 e - M): exponents of at most about 0, and the
// product and the difference are one vfmadd, rounded once. Below 2^-126 they count as nothing, beside sums of at least
// 1 / 4.
#pragma once

#include <algorithm>

#include "divergence/divergence.h"
#include "divergence/power.h"

namespace klfast::divergence {
namespace {

inline float extreme(Vec v, bool largest) {
    float lane[kLanes];
    store(lane, v);
    float best = lane[0];
    for (float x : lane)
        if (largest ? x > best : x < best) best = x;
    return best;
}

// body(a, b, valid, tail) for each vector of the two rows; in the last, lanes beyond n hold a_fill and b_fill, and
// `valid` is 0 there and 1 elsewhere.
template <class Body>
inline void for_each(const float* a, const float* b, int n, float a_fill, float b_fill, Body&& body) {
    const Vec one = set(1.0f);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) body(load(a + i), load(b + i), one, false);
    if (i == n) return;
    float lane[kLanes] = {};
    for (int k = 0; k < n - i; ++k) lane[k] = 1.0f;
    const Vec valid = load(lane), other = one - valid;
    body(fma(other, set(a_fill), load(a, i, DType::f32, n - i)), fma(other, set(b_fill), load(b, i, DType::f32, n - i)),
         valid, true);
}

// loop(a, b, n) in runs so short that a lane adds at most `Terms` numbers in float32. Equal ones are all rounded the
// same way: their sum comes to be off by Terms 2^-25 of itself.
template <int Terms, class Loop>
inline void in_runs(const float* a, const float* b, int n, Loop&& loop) {
    constexpr int kRun = std::min(kColumns, Terms * kLanes);
    for (int start = 0; start < n; start += kRun) loop(a + start, b + start, std::min(kRun, n - start));
}

constexpr int kWeights = kLanes == 1 ? 32 : 128;  // a run: their sums cancel in part

void scan(const float* a, const float* b, int n, Scan& out) {
    const float d = b[0] - a[0];
    out = {.max_a = a[0], .max_b = b[0], .min_d = d, .max_d = d, .sum_a2 = 0, .sum_d2 = 0};
    in_runs<256>(a, b, n, [&](const float* from_a, const float* from_b, int count) {
        Vec max_a = set(out.max_a), max_b = set(out.max_b), min_d = set(out.min_d), max_d = set(out.max_d);
        Vec sum_a2 = set(0), sum_d2 = set(0);
        for_each(from_a, from_b, count, from_a[0], from_b[0], [&](Vec u, Vec v, Vec valid, bool tail) {
            Vec d = v - u;
            max_a = max(max_a, u), max_b = max(max_b, v), min_d = min(min_d, d), max_d = max(max_d, d);
            if (tail) u = u * valid, d = d * valid;
            sum_a2 = fma(u, u, sum_a2), sum_d2 = fma(d, d, sum_d2);
        });
        out = {
            .max_a = extreme(max_a, true),
            .max_b = extreme(max_b, true),
            .min_d = extreme(min_d, false),
            .max_d = extreme(max_d, true),
            .sum_a2 = out.sum_a2 + sum(sum_a2),
            .sum_d2 = out.sum_d2 + sum(sum_d2),
        };
    });
}

// a b + c, rounded once, also where Vec has no such instruction.
template <class V>
V exact_fma(V a, V b, V c) {
    if constexpr (V::width == 1)
        return {static_cast<float>(static_cast<double>(a.v) * b.v + c.v)};
    else
        return fma(a, b, c);
}

// Asks for the next kColumns of both rows while these are worked on: the hardware's prefetch stops at each page.
struct Ahead {
    const char *a, *b;
    Ahead(const float* from_a, const float* from_b)
        : a(reinterpret_cast<const char*>(from_a + kColumns)), b(reinterpret_cast<const char*>(from_b + kColumns)) {}
    void step() {
        __builtin_prefetch(a, 0, 2), __builtin_prefetch(b, 0, 2);
        a += kLanes * sizeof(float), b += kLanes * sizeof(float);
    }
};

template <int Count>
void add_moments(const float* a, const float* b, int n, float anchor, float reference, Moments& out) {
    const Vec c = set(anchor), log2e = set(kLog2e), minus_m = set(-reference);
    const float likely = reference / kLog2e;  // a logit of weight 1
    Ahead ahead(a, b);
    Vec moment[Count];
    for (Vec& power : moment) power = set(0);
    for_each(a, b, n, likely, likely, [&](Vec u, Vec v, Vec valid, bool tail) {
        ahead.step();
        Vec x = (v - u) - c, term = power<false>(exact_fma(u, log2e, minus_m));
        if (tail) x = x * valid, term = term * valid;
        Vec odd = term * x;
        const Vec x2 = x * x;  // two chains of products, half as long as one
        moment[0] = moment[0] + term;
        for (int k = 1; k < Count; k += 2) {
            moment[k] = moment[k] + odd, term = term * x2, moment[k + 1] = moment[k + 1] + term;
            if (k + 2 < Count) odd = odd * x2;
        }
    });
    for (int k = 0; k < Count; ++k) out.m[k] += sum(moment[k]);
}

void moments(const float* a, const float* b, int n, float anchor, float reference, float largest_x, Moments& out) {
    const auto add = largest_x <= kTiny     ? add_moments<5>
                     : largest_x <= kMedium ? add_moments<7>
                                            : add_moments<kMoments>;
    out = {};
    in_runs<kWeights>(a, b, n,
                      [&](const float* u, const float* v, int count) { add(u, v, count, anchor, reference, out); });
}

// With y = |x|, E = e^-y and t = tanh(y / 2) = (1 - E) / (1 + E) >= 0, the larger of A and B is H = 2^((a + max(x, 0))
// log2 e - M) and W = H (1 + E). T = y / 2 - t = atanh(t) - t and J = t y / 4 - log cosh(y / 2) / 2 are t^3 and t^2
// times polynomials in t^2 for y < 1/2 (minimax, 4e-8), and direct beyond, where they lose a factor of 50 at most of
// 6e-8. With the sign s of x and u = s t:
//     A g(x) = W (t^2 - (1 - u) s T),   B g(-x) = W (t^2 + (1 + u) s T),   A j(x) = W J,
//     2 B (x / 4 - log cosh(x / 2) / 2) = W (1 + u) (J + (x - t y) / 4).
//
// Wide: where |x| may be as large as float32 allows, B comes from b itself, and what grows with x is added in units of
// kUnit, so that sums do not overflow. This takes logits near 0 wherever they have weight.
template <bool Wide>
void add_sums(const float* a, const float* b, int n, float anchor, float reference, Sums& out) {
    const Vec c = set(anchor), log2e = set(kLog2e), minus_m = set(-reference), one = set(1.0f), half = set(0.5f),
              quarter = set(0.25f);
    constexpr float kUnit = 0x1p24f;
    const Vec minus_mb = set(-(reference + anchor * kLog2e)), unit = set(1 / kUnit);
    Vec mu[kMoments], k1 = set(0), k2 = set(0), j = set(0), q = set(0);
    for (Vec& power : mu) power = set(0);
    const float likely = reference / kLog2e;
    Ahead ahead(a, b);
    for_each(a, b, n, likely, likely, [&](Vec p, Vec r, Vec valid, bool tail) {
        ahead.step();
        Vec x = (r - p) - c;
        if (tail) x = x * valid;
        const Vec minus_y = negative_abs(x), y = set(0) - minus_y;
        const Vec less_one = expm1(minus_y), e = less_one + one, e1 = e + one;
        const Vec t = quotient(set(0) - less_one, e1), t2 = t * t;
        const Vec of_a = exact_fma(p, log2e, minus_m);
        Vec w = power(Wide ? max(of_a, exact_fma(r, log2e, minus_mb)) : exact_fma(max(x, set(0)), log2e, of_a)) * e1;
        if (tail) w = w * valid;

        Vec poly = fma(t2, set(1.22889162e-1f), set(1.42402410e-1f));
        poly = fma(t2, poly, set(2.00005580e-1f));
        poly = fma(t2, poly, set(3.33333320e-1f));
        const Vec T = select_less(y, half, t * t2 * poly, fma(half, y, set(0) - t));

        poly = fma(t2, set(9.63774e-3f), set(1.663943e-2f));
        poly = fma(t2, poly, set(4.166700e-2f));
        poly = fma(t2, poly, quarter);
        Vec log1p_e = fma(e, set(3.0968000e-2f), set(-1.0212532e-1f));  // / e, for e <= 0.61: minimax, 8e-8
        log1p_e = fma(e, log1p_e, set(1.7803652e-1f));
        log1p_e = fma(e, log1p_e, set(-2.4587005e-1f));
        log1p_e = fma(e, log1p_e, set(3.3295048e-1f));
        log1p_e = fma(e, log1p_e, set(-4.9998647e-1f));
        log1p_e = e * fma(e, log1p_e, set(9.9999992e-1f));
        const Vec far = fma(quarter * y, t - one, half * (set(0.69314718f) - log1p_e));
        const Vec J = select_less(y, half, t2 * poly, far);

        const Vec u = copysign(t, x), signed_T = copysign(T, x), up = one + u;
        const Vec scaled = Wide ? w * unit : w, signed_y = quarter * x - t * (quarter * y);
        k1 = fma(scaled, fma(u - one, signed_T, t2), k1);
        k2 = fma(scaled, fma(up, signed_T, t2), k2);
        j = fma(w, J, j);
        q = fma(scaled * up, signed_y + J, q);
        Vec even = w, odd = w * u;  // two chains of products, half as long as one
        mu[0] = mu[0] + even;
        for (int k = 1; k < kMoments; k += 2) {
            mu[k] = mu[k] + odd, even = even * t2, mu[k + 1] = mu[k + 1] + even;
            if (k + 2 < kMoments) odd = odd * t2;
        }
    });
    for (int k = 0; k < kMoments; ++k) out.mu[k] += sum(mu[k]);
    constexpr double scale = Wide ? kUnit : 1;
    out.k1 += sum(k1) * scale, out.k2 += sum(k2) * scale, out.j += sum(j), out.q += sum(q) * scale / 2;
}

template <bool Wide>
void sums(const float* a, const float* b, int n, float anchor, float reference, Sums& out) {
    out = {};
    in_runs<kWeights>(a, b, n, [&](const float* u, const float* v, int count) {
        add_sums<Wide>(u, v, count, anchor, reference, out);
    });
}

void powers(const float* a, const float* b, int n, float anchor, float reference, Powers& out) {
    const Vec c = set(anchor), log2e = set(kLog2e), minus_m = set(-reference);
    const float likely = reference / kLog2e;
    out = {};
    in_runs<kWeights>(a, b, n, [&](const float* from_a, const float* from_b, int count) {
        Ahead ahead(from_a, from_b);
        Vec h[kPowers], signed_h[kPowers], y[2], signed_y[2];  // y in units of -log 2
        for (int k = 0; k < kPowers; ++k) h[k] = signed_h[k] = set(0);
        for (int k = 0; k < 2; ++k) y[k] = signed_y[k] = set(0);
        for_each(from_a, from_b, count, likely, likely, [&](Vec u, Vec v, Vec valid, bool tail) {
            ahead.step();
            Vec x = ((v - u) - c) * log2e;
            if (tail) x = x * valid;
            const Vec minus_y = negative_abs(x), e = power(minus_y);
            Vec larger = power(exact_fma(u, log2e, minus_m) + max(x, set(0)));
            if (tail) larger = larger * valid;
            const Vec with_sign = copysign(larger, x), ey = e * minus_y;
            const Vec e2 = e * e, e3 = e2 * e, e4 = e2 * e2, e5 = e3 * e2, e6 = e3 * e3;
            const Vec power_of[kPowers] = {e, e, e2, e3, e4, e5, e6};
            h[0] = h[0] + larger, signed_h[0] = signed_h[0] + with_sign;
            for (int k = 1; k < kPowers; ++k)
                h[k] = fma(power_of[k], larger, h[k]), signed_h[k] = fma(power_of[k], with_sign, signed_h[k]);
            y[0] = fma(minus_y, larger, y[0]), signed_y[0] = fma(minus_y, with_sign, signed_y[0]);
            y[1] = fma(ey, larger, y[1]), signed_y[1] = fma(ey, with_sign, signed_y[1]);
        });
        for (int k = 0; k < kPowers; ++k) out.h[k] += sum(h[k]), out.signed_h[k] += sum(signed_h[k]);
        for (int k = 0; k < 2; ++k)
            out.y[k] -= sum(y[k]) / double{kLog2e}, out.signed_y[k] -= sum(signed_y[k]) / double{kLog2e};
    });
}

void widen(const void* from, DType dtype, int n, float* to) {
    const char* const ahead = static_cast<const char*>(from) + kColumns * size_of(dtype);  // as in Ahead
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        __builtin_prefetch(ahead + i * size_of(dtype), 0, 2);
        store(to + i, load(from, i, dtype, kLanes));
    }
    if (i < n) store(to, i, DType::f32, n - i, load(from, i, dtype, n - i));
}

}  // namespace
}  // namespace klfast::divergence
