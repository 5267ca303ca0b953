#include "divergence/state.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace klfast::divergence {
namespace {

constexpr int kMaxRuns = 5;  // the second suffices unless the first columns mislead by more than e^12

using Series = std::array<double, kMoments>;  // power series in x, truncated

constexpr Series multiply(const Series& u, const Series& v) {
    Series product{};
    for (int i = 0; i < kMoments; ++i)
        for (int k = 0; i + k < kMoments; ++k) product[i + k] += u[i] * v[k];
    return product;
}

// Power series of each member of Sums, per unit of A.
struct SeriesTable {
    Series mu[kMoments]{}, k1{}, k2{}, j{}, q{};

    constexpr SeriesTable() {
        Series e{}, t{}, l{};  // e^x, tanh(x / 2), log cosh(x / 2)
        e[0] = 1;
        for (int n = 1; n < kMoments; ++n) e[n] = e[n - 1] / n;
        for (int n = 1; n < kMoments; ++n) {  // t' = (1 - t^2) / 2 and l' = t / 2
            const Series t2 = multiply(t, t);
            t[n] = ((n == 1) - t2[n - 1]) / (2 * n);
            l[n] = t[n - 1] / (2 * n);
        }
        Series one_and_e = e, xe{};
        one_and_e[0] += 1;
        for (int n = 1; n < kMoments; ++n) xe[n] = e[n - 1];
        mu[0] = one_and_e;
        for (int k = 1; k < kMoments; ++k) mu[k] = multiply(mu[k - 1], t);
        Series half{};  // log((1 + e^x) / 2) = l(x) + x / 2
        half = l;
        half[1] += 0.5;
        const Series mixture = multiply(one_and_e, half);
        for (int n = 2; n < kMoments; ++n) {
            k1[n] = e[n];
            k2[n] = xe[n] - e[n];  // B g(-x) = A (x e^x - e^x + 1)
            j[n] = (xe[n] - mixture[n]) / 2;
        }
        Series quarter{};
        for (int n = 0; n < kMoments; ++n) quarter[n] = (n == 1 ? 0.25 : 0) - l[n] / 2;
        q = multiply(e, quarter);
    }
};
constexpr SeriesTable kSeries;

double dot(const Series& series, const Moments& moments) {
    double sum = 0;
    for (int n = kMoments - 1; n >= 0; --n) sum += series[n] * moments.m[n];
    return sum;
}

double g(double x) { return std::expm1(x) - x; }

// The difference of the maxima.
double top_anchor(const State& state) { return (state.max_b - state.base_b) - (state.max_a - state.base_a); }

// What to subtract from a model's logits, given the largest: nothing where that is small already.
double base(double largest) { return std::abs(largest) <= kWide ? 0 : largest; }

}  // namespace

Sums operator*(const Sums& s, double factor) {
    Sums out = s;
    for (double& mu : out.mu) mu *= factor;
    out.k1 *= factor, out.k2 *= factor, out.j *= factor, out.q *= factor;
    return out;
}

Sums operator+(const Sums& s, const Sums& other) {
    Sums out = s;
    for (int k = 0; k < kMoments; ++k) out.mu[k] += other.mu[k];
    out.k1 += other.k1, out.k2 += other.k2, out.j += other.j, out.q += other.q;
    return out;
}

Sums from_moments(const Moments& moments) {
    Sums out;
    for (int k = 0; k < kMoments; ++k) out.mu[k] = dot(kSeries.mu[k], moments);
    out.k1 = dot(kSeries.k1, moments), out.k2 = dot(kSeries.k2, moments);
    out.j = dot(kSeries.j, moments), out.q = dot(kSeries.q, moments);
    return out;
}

double better_anchor(const State& state) {
    const double delta = 2 * std::atanh(state.sums.mu[1] / state.sums.mu[0]);
    // Beyond 12, the smaller of Za and Zb is lost in rounding; the difference of the maxima is right to log V.
    return std::abs(delta) <= 12 ? state.anchor + delta : top_anchor(state);
}

bool metrics(const State& state, std::int64_t vocab, float* out, std::int64_t stride) {
    if (state.phase == kMeasuring) return false;
    const Sums& s = state.sums;
    const double tau = s.mu[1] / s.mu[0];
    const bool last = state.runs >= kMaxRuns;
    if (std::abs(tau) > 0.5 && !last) return false;
    const double za = (s.mu[0] - s.mu[1]) / 2, zb = (s.mu[0] + s.mu[1]) / 2;
    const double delta = 2 * std::atanh(tau), shrink = std::exp(-delta);
    const double kl_pq = s.k1 / za - g(delta), kl_qp = s.k2 / zb - g(-delta);

    double series = 0, power = 1;
    for (int k = 1; k < kMoments - 1; ++k) {
        power *= tau;
        series += power / k * ((s.mu[k] - s.mu[k + 1]) + shrink * (s.mu[k] + s.mu[k + 1])) / 2;
    }
    const double jsd = (s.j + (shrink - 1) * s.q + series / 2) / za + std::log1p(-tau * tau) / 2;
    const double left_out = s.mu[kMoments - 1] / za * std::pow(tau, kMoments - 1) / (kMoments - 1);
    // Where delta outweighs the divergence, the subtractions above cost digits: 1e3 of the 1e7 that the sums have.
    constexpr double kNothing = 1e-14;
    const bool accurate = left_out <= 1e-5 * jsd + kNothing && g(std::abs(delta)) <= 1e3 * std::min(kl_pq, kl_qp) + kNothing;
    if (!accurate && !last) return false;

    const double log_za = state.reference / kLog2e + std::log(za), log_zb = log_za + state.anchor + delta;
    const double target_a = state.target_a - state.base_a, target_b = state.target_b - state.base_b;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double values[8] = {
        std::max(kl_pq, 0.0),
        std::max(kl_qp, 0.0),
        std::clamp(jsd, 0.0, std::log(2.0)),
        state.sum_d2 / static_cast<double>(vocab),
        state.sum_d2 > 0 ? 10 * std::log10(state.sum_a2 / state.sum_d2) : std::numeric_limits<double>::infinity(),
        state.has_target ? std::max(log_za - target_a, 0.0) : nan,
        state.has_target ? std::max(log_zb - target_b, 0.0) : nan,
        state.argmax_a == state.argmax_b ? 1.0 : 0.0,
    };
    for (int i = 0; i < 8; ++i) out[i * stride] = static_cast<float>(values[i]);
    return true;
}

void restart(State& state) {
    State next{};
    next.runs = state.runs + 1;
    next.has_anchor = 1;
    const double anchor = state.phase == kMeasuring ? 0 : better_anchor(state);
    if (state.phase == kPlain && std::abs(anchor) <= kWide) {
        next.anchor = static_cast<float>(anchor);
        state = next;
        return;
    }
    next.phase = kShifted;
    next.sum_a2 = state.sum_a2, next.sum_d2 = state.sum_d2;
    next.max_a = state.max_a, next.max_b = state.max_b;
    next.argmax_a = state.argmax_a, next.argmax_b = state.argmax_b;
    next.base_a = base(state.max_a), next.base_b = base(state.max_b);
    next.anchor = static_cast<float>(state.phase == kShifted ? anchor : top_anchor(next));
    const double largest = std::max(next.max_a - next.base_a, next.max_b - next.base_b - next.anchor);
    next.reference = std::ceil(largest * kLog2e);
    state = next;
}

}  // namespace klfast::divergence
