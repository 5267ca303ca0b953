// The vector loops of divergence.h, written once for every tier. A tier's file defines KLFAST_TIER and, before it includes
// this, in an anonymous namespace inside klfast::KLFAST_TIER, a vector F of kWidth floats with + - * / and
//     load(p) load_n(p, n, fill) store(p, v) splat(s) lanes(n): 1 in the first n lanes, else 0
//     fma(a, b, c) max min abs copysign(size, sign) round(v) scale(v, n): v * 2^n, n integral in -126..127
//     less(u, v, yes, no): lane by lane, yes where u < v
//
// exp(v) = 2^n (1 + r + r^2 P(r)) with n = round(v / log 2) and |r| <= 0.35; P of degree 4 is a minimax fit, its error
// 1.4e-8 of r, so that e^v - 1 keeps 2e-7 relative at any v <= 0 (where n = 0 it is r + r^2 P(r); else it is at least
// 0.29 in size). Arguments below -87 are taken as -87: a weight of 1e-38 beside one of at least 1 / 2.
namespace klfast::KLFAST_TIER {
namespace {

using divergence::kMoments;

struct Exponential {
    F fraction, n;  // e^v = 2^n (1 + fraction)
};

inline Exponential exponential(F v) {
    v = max(v, splat(-87.0f));
    const F n = round(v * splat(1.44269504f));
    F r = fma(n, splat(-0.693359375f), v);  // log 2 in two parts, the first with 9 bits, so that n times it is exact
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(1.39465528e-3f);
    p = fma(p, r, splat(8.36663731e-3f));
    p = fma(p, r, splat(4.16662834e-2f));
    p = fma(p, r, splat(1.66665434e-1f));
    p = fma(p, r, splat(5.00000070e-1f));
    return {fma(r * r, p, r), n};
}

inline F exp(F v) {
    const auto [fraction, n] = exponential(v);
    return scale(fraction + splat(1.0f), n);
}

// e^v - 1 for v <= 0.
inline F expm1(F v) {
    const auto [fraction, n] = exponential(v);
    return scale(fraction, n) + (scale(splat(1.0f), n) - splat(1.0f));
}

inline double sum(F v) {
    float lane[kWidth];
    store(lane, v);
    double total = 0;
    for (float x : lane) total += x;
    return total;
}

inline float extreme(F v, bool largest) {
    float lane[kWidth];
    store(lane, v);
    float best = lane[0];
    for (float x : lane)
        if (largest ? x > best : x < best) best = x;
    return best;
}

// body(a, b, valid, tail) for each vector of the two rows; in the last, lanes beyond n hold `fill`, and `valid` is 0.
template <class Body>
inline void for_each(const float* a, const float* b, int n, float a_fill, float b_fill, Body&& body) {
    int i = 0;
    for (; i + kWidth <= n; i += kWidth) body(load(a + i), load(b + i), splat(1.0f), false);
    if (i < n) body(load_n(a + i, n - i, a_fill), load_n(b + i, n - i, b_fill), lanes(n - i), true);
}

void scan(const float* a, const float* b, int n, divergence::Scan& out) {
    const F d0 = splat(b[0]) - splat(a[0]);
    F max_a = splat(a[0]), max_b = splat(b[0]), min_d = d0, max_d = d0, sum_a2 = splat(0), sum_d2 = splat(0);
    for_each(a, b, n, a[0], b[0], [&](F u, F v, F valid, bool tail) {
        F d = v - u;
        max_a = max(max_a, u), max_b = max(max_b, v), min_d = min(min_d, d), max_d = max(max_d, d);
        if (tail) u = u * valid, d = d * valid;
        sum_a2 = fma(u, u, sum_a2), sum_d2 = fma(d, d, sum_d2);
    });
    out = {extreme(max_a, true), extreme(max_b, true), extreme(min_d, false), extreme(max_d, true), sum(sum_a2), sum(sum_d2)};
}

void moments(const float* a, const float* b, int n, float anchor, float reference, divergence::Moments& out) {
    const F c = splat(anchor), m = splat(reference);
    F total[kMoments];
    for (F& t : total) t = splat(0);
    for_each(a, b, n, reference, reference, [&](F u, F v, F valid, bool tail) {
        F x = (v - u) - c, term = exp(u - m);
        if (tail) x = x * valid, term = term * valid;
        total[0] = total[0] + term;
        for (int k = 1; k < kMoments; ++k) term = term * x, total[k] = total[k] + term;
    });
    for (int k = 0; k < kMoments; ++k) out.m[k] = sum(total[k]);
}

// With y = |x|, E = e^-y and t = tanh(y / 2) = (1 - E) / (1 + E) >= 0, the larger of A and B is H = exp(a - M + max(x, 0))
// and W = H (1 + E). T = y / 2 - t = atanh(t) - t and J = t y / 4 - log cosh(y / 2) / 2 are t^3 and t^2 times polynomials
// in t^2 for y < 1/2 (minimax, 4e-8), and direct beyond, where they lose a factor of 50 at most of 6e-8. With the sign s
// of x and u = s t:
//     A g(x) = W (t^2 - (1 - u) s T),   B g(-x) = W (t^2 + (1 + u) s T),   A j(x) = W J,
//     2 B (x / 4 - log cosh(x / 2) / 2) = W (1 + u) (J + (x - t y) / 4).
void sums(const float* a, const float* b, int n, float anchor, float reference, divergence::Sums& out) {
    const F c = splat(anchor), m = splat(reference), one = splat(1.0f), half = splat(0.5f), quarter = splat(0.25f);
    F mu[kMoments], k1 = splat(0), k2 = splat(0), j = splat(0), q = splat(0);
    for (F& sum : mu) sum = splat(0);
    for_each(a, b, n, reference, reference, [&](F p, F r, F valid, bool tail) {
        F x = (r - p) - c;
        if (tail) x = x * valid;
        const F y = abs(x);
        const F less_one = expm1(splat(0) - y), e = less_one + one, e1 = e + one;
        const F t = (splat(0) - less_one) / e1, t2 = t * t;
        F w = exp((p - m) + max(x, splat(0))) * e1;
        if (tail) w = w * valid;

        F poly = fma(t2, splat(1.22889162e-1f), splat(1.42402410e-1f));
        poly = fma(t2, poly, splat(2.00005580e-1f));
        poly = fma(t2, poly, splat(3.33333320e-1f));
        const F T = less(y, half, t * t2 * poly, fma(half, y, splat(0) - t));

        poly = fma(t2, splat(9.63774e-3f), splat(1.663943e-2f));
        poly = fma(t2, poly, splat(4.166700e-2f));
        poly = fma(t2, poly, quarter);
        F log1p_e = fma(e, splat(3.0968000e-2f), splat(-1.0212532e-1f));  // / e, for e <= 0.61: minimax, 8e-8
        log1p_e = fma(e, log1p_e, splat(1.7803652e-1f));
        log1p_e = fma(e, log1p_e, splat(-2.4587005e-1f));
        log1p_e = fma(e, log1p_e, splat(3.3295048e-1f));
        log1p_e = fma(e, log1p_e, splat(-4.9998647e-1f));
        log1p_e = e * fma(e, log1p_e, splat(9.9999992e-1f));
        const F far = fma(quarter * y, t - one, half * (splat(0.69314718f) - log1p_e));
        const F J = less(y, half, t2 * poly, far);

        const F u = copysign(t, x), signed_T = copysign(T, x), up = one + u;
        k1 = fma(w, fma(u - one, signed_T, t2), k1);
        k2 = fma(w, fma(up, signed_T, t2), k2);
        j = fma(w, J, j);
        q = fma(w * up, fma(quarter, x - t * y, J), q);
        mu[0] = mu[0] + w;
        for (int k = 1; k < kMoments; ++k) w = w * u, mu[k] = mu[k] + w;
    });
    for (int k = 0; k < kMoments; ++k) out.mu[k] = sum(mu[k]);
    out.k1 = sum(k1), out.k2 = sum(k2), out.j = sum(j), out.q = sum(q) / 2;
}

}  // namespace
}  // namespace klfast::KLFAST_TIER
