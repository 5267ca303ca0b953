// What is known of one token after some of its vocabulary, and how the metrics follow from it.
//
// Let a and b be the teacher's and the student's logits, R a reference (at least about the largest logit) and c an
// anchor near log(sum e^b) - log(sum e^a). Per vocabulary entry
//     x = b - a - c,   A = exp(a - R),   B = A e^x,   W = A + B,   t = tanh(x / 2) = (B - A) / (B + A).
// With g(x) = e^x - 1 - x >= 0 and j(x) = (x e^x - (1 + e^x) log((1 + e^x) / 2)) / 2 >= 0, all of second order in x,
// and l(x) = log cosh(x / 2), a state holds sums over the entries seen so far:
//     mu_k = sum W t^k (k = 0..8),   k1 = sum A g(x),   k2 = sum B g(-x),   j = sum A j(x),
//     q = sum B (x / 4 - l(x) / 2).
// No term of k1, k2 or j is negative, so these lose no digits, however close the distributions.
//
// At the end, Za = sum A = (mu_0 - mu_1) / 2 and Zb = (mu_0 + mu_1) / 2. The anchor was off by delta = log(Zb / Za),
// and tau = tanh(delta / 2) = mu_1 / mu_0. With p = A / Za and q = B / Zb, exactly:
//     KL(p || q) = k1 / Za - g(delta),   KL(q || p) = k2 / Zb - g(-delta),
//     JSD = [j + (e^-delta - 1) q - 1/2 sum (A + B e^-delta) log(1 - t tau)] / Za - l(delta)
// (the last from l(x - delta) = l(x) + l(delta) + log(1 - t tau)), where log(1 - t tau) = -sum_k (t tau)^k / k needs
// mu_1..mu_8 alone. Delta small is all that accuracy needs; the first columns of a row give an anchor that nearly
// always will do, and where it does not, the row runs again with the anchor that the first run found.
//
// Where |x| <= kSmall throughout a block, all these sums are polynomials in x to within 6e-6 of each, so the
// vector loop makes only the moments sum A x^k (k = 0..8; to 6 for |x| <= kMedium, to 4 for |x| <= kTiny): one
// exponential an entry.
//
// Where the distributions are far apart (kFar), cancellation costs nothing, and less will do: with E = e^-|x|, H the
// larger of A and B and s the sign of x, the sums H E^k, s H E^k (k = 0..6), and H |x|, H E |x|, s H |x|, s H E |x|.
// They give Za, Zb and both KLs, and the JSD, whatever delta, since x log x is nearly a polynomial in E (from_powers in
// token_state.cpp).
//
// Vector loops add float32 over at most kColumns entries; what crosses their runs is double.
//
// x and the exponents of the weights are float32, so wrong by 2^-24 of their size, which moves log Za and log Zb. A
// cross-entropy is small only where one entry outweighs all others. So the state keeps the rounding error of each
// model's most likely entry (find_rounding in divergence.cpp), and the cross-entropies are corrected by it.
//
// Float32 differences of large logits carry no digits of the weights. A row in which some |x| exceeds kWide, or whose
// logits are too large for M, is `wide`: its first run only finds maxima and sums of squares; the next ones take
// the logits relative to bases near the maxima, where all that has weight is small (shift() in divergence.cpp).
#pragma once

#include <cstdint>

#include "core/numbers.h"

namespace klfast::divergence {

inline constexpr int kMoments = 9;     // of t, and of x where x is small; odd, for the loops take them in pairs
inline constexpr float kSmall = 1.0f;  // largest |x| for the polynomials
inline constexpr float kMedium = 0.5f;
inline constexpr float kTiny = 1.0f / 16;
inline constexpr double kFar = 0.05;  // least KL for sums of powers, which are right to about 3e-7 nats
inline constexpr int kPowers = 7;
inline constexpr int kColumns = 2048;  // columns per vector loop: both rows stay in the L1 cache
inline constexpr float kWide =
    64.0f;  // largest |x| and |anchor| for weights made of differences: 2^-24 |x| is their error
inline constexpr float kDead = -1000.0f;  // an entry this far below its row's largest has no weight

struct Sums {
    double mu[kMoments], k1, k2, j, q;
};
struct Moments {
    double m[kMoments];  // sum A x^k
};

struct Powers {
    double h[kPowers], signed_h[kPowers];  // sum H E^k, sum s H E^k
    double y[2], signed_y[2];              // sum H |x|, sum H E |x|; with s
};

enum Phase : std::int64_t {
    kPlain,      // logits as they are
    kMeasuring,  // the row turned out to be wide: only what does not depend on the anchor is found
    kShifted,    // logits relative to the bases; what kMeasuring found stays
};

struct State {
    Sums sums;
    double reference, anchor;  // the reference as M = R log2 e, an integer; both relative to the bases
    double base_a, base_b;     // 0 unless kShifted
    double sum_a2, sum_d2;     // over a^2 and (b - a)^2
    double max_a, max_b;
    double rounding_a, rounding_b;    // exact minus rounded log A of the teacher's most likely entry; of B
    std::int64_t argmax_a, argmax_b;  // the lowest index among equals
    double target_a, target_b;        // logits of the target; see has_target
    std::int64_t columns;             // seen so far
    std::int64_t fault;               // see Fault
    std::int64_t has_anchor, has_target, runs;
    std::int64_t phase;
    std::int64_t is_far;  // the row goes by powers instead of sums
    Powers powers;
};

// 0, or f = 1 + 2 * column + (1 if the student's) of the first logit that is not finite; -f of one that is further from
// its row's largest than float32 reaches.
using Fault = std::int64_t;

Sums operator*(const Sums& s, double factor);
Sums operator+(const Sums& s, const Sums& other);
Sums from_moments(const Moments& moments, float largest);  // |x| <= largest, one of the limits above
Powers operator*(const Powers& p, double factor);
Powers operator+(const Powers& p, const Powers& other);

// Whether a state's powers say that the distributions are far apart.
bool are_far(const State& state);

// The anchor that the sums point to.
double better_anchor(const State& state);

// Writes the 8 metrics at out[0], out[stride] ...; false if the anchor was too far off for them.
bool metrics(const State& state, std::int64_t vocab, float* out, std::int64_t stride);

// Prepare a state that has seen its whole row for another run over it, with a better anchor or relative to bases.
void restart(State& state);

}  // namespace klfast::divergence
