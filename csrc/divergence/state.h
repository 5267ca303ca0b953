// What is known of one token after some of its vocabulary, and how the metrics follow from it.
//
// Let a and b be the teacher's and the student's logits, R a reference (at least about the largest logit) and c an
// anchor near log(sum e^b) - log(sum e^a). Per vocabulary entry
//     x = b - a - c,   A = exp(a - R),   B = A e^x,   W = A + B,   t = tanh(x / 2) = (B - A) / (B + A).
// With g(x) = e^x - 1 - x >= 0 and j(x) = (x e^x - (1 + e^x) log((1 + e^x) / 2)) / 2 >= 0, all of second order in x, and
// l(x) = log cosh(x / 2), a state holds sums over the entries seen so far:
//     mu_k = sum W t^k (k = 0..8),   k1 = sum A g(x),   k2 = sum B g(-x),   j = sum A j(x),   q = sum B (x / 4 - l(x) / 2).
// No term of k1, k2 or j is negative, so these lose no digits, however close the distributions.
//
// At the end, Za = sum A = (mu_0 - mu_1) / 2 and Zb = (mu_0 + mu_1) / 2. The anchor was off by delta = log(Zb / Za), and
// tau = tanh(delta / 2) = mu_1 / mu_0. With p = A / Za and q = B / Zb, exactly:
//     KL(p || q) = k1 / Za - g(delta),   KL(q || p) = k2 / Zb - g(-delta),
//     JSD = [j + (e^-delta - 1) q - 1/2 sum (A + B e^-delta) log(1 - t tau)] / Za - l(delta)
// (the last from l(x - delta) = l(x) + l(delta) + log(1 - t tau)), where log(1 - t tau) = -sum_k (t tau)^k / k needs
// mu_1..mu_8 alone. Delta small is all that accuracy needs; the first columns of a row give an anchor that nearly
// always will do, and where it does not, the row runs again with the anchor that the first run found.
//
// Where |x| <= kSmall throughout a block, all these sums are power series in x, so the vector loop makes only the
// moments sum A x^k (k = 0..8; to 6 for |x| <= kSmall / 2, to 4 for |x| <= kTiny): one exponential an entry. The terms
// left out are below 1e-6 of each sum.
//
// Vector loops add float32 over kColumns entries; what crosses blocks is double.
#pragma once

#include <cstdint>

namespace klfast::divergence {

inline constexpr int kMoments = 9;      // of t, and of x where x is small; odd, for the loops take them in pairs
inline constexpr float kLog2e = 0x1.715476p+0f;  // as the vector loops have it: R is an integer divided by this
inline constexpr float kSmall = 0.5f;   // largest |x| for the power series
inline constexpr float kTiny = 1.0f / 32;
inline constexpr int kColumns = 2048;   // columns per vector loop: both rows stay in the L1 cache

struct Sums {
    double mu[kMoments], k1, k2, j, q;
};
struct Moments {
    double m[kMoments];  // sum A x^k
};

struct State {
    Sums sums;
    double reference, anchor;  // the reference as M = R log2 e, an integer
    double sum_a2, sum_d2;  // over a^2 and (b - a)^2
    double max_a, max_b;
    std::int64_t argmax_a, argmax_b;  // the lowest index among equals
    double target_a, target_b;        // logits of the target; see has_target
    std::int64_t columns;             // seen so far
    std::int64_t fault;               // 0, or 1 + 2 * column + (1 if the student's) of the first logit that is not finite
    std::int64_t has_anchor, has_target, runs;
};

Sums operator*(const Sums& s, double factor);
Sums operator+(const Sums& s, const Sums& other);
Sums from_moments(const Moments& moments);

// The anchor that the sums point to.
double better_anchor(const State& state);

// Writes the 8 metrics at out[0], out[stride] ...; false if the anchor was too far off for them.
bool metrics(const State& state, std::int64_t vocab, float* out, std::int64_t stride);

// Forget all but the anchor, which becomes `anchor`.
void restart(State& state, double anchor);

}  // namespace klfast::divergence
