#include "divergence/token_state.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>

namespace klfast::divergence {
namespace {

constexpr int kMaxRuns = 5;  // the second suffices unless the first columns mislead by more than e^12

constexpr int kTerms = 40;  // of power series: |x| <= 1 is a third of their radius

using Series = std::array<double, kTerms>;
using Row = std::array<double, kMoments>;

Series multiply(const Series& u, const Series& v) {
    Series product{};
    for (int i = 0; i < kTerms; ++i)
        for (int k = 0; i + k < kTerms; ++k) product[i + k] += u[i] * v[k];
    return product;
}

// A polynomial of degree `count` - 1, whose first `zeros` coefficients vanish, near a power series that begins
// likewise, in |x| <= limit: through the Chebyshev nodes, by divided differences.
Row economize(const Series& series, int zeros, int count, double limit) {
    const int n = count - zeros;
    double node[kMoments]{}, value[kMoments]{};
    Row row{};
    for (int i = 0; i < n; ++i) {
        node[i] = limit * std::cos(std::numbers::pi * (2 * i + 1) / (2 * n));
        for (int k = kTerms - 1; k >= zeros; --k) value[i] = value[i] * node[i] + series[k];
    }
    for (int order = 1; order < n; ++order)
        for (int i = n - 1; i >= order; --i) value[i] = (value[i] - value[i - 1]) / (node[i] - node[i - order]);
    for (int i = n - 1; i >= 0; --i) {  // row = row * (x - node[i]) + value[i], shifted by `zeros`
        for (int k = count - 1; k >= zeros; --k) row[k] = (k > zeros ? row[k - 1] : 0) - node[i] * row[k];
        row[zeros] += value[i];
    }
    return row;
}

// Polynomials for each member of Sums, per unit of A, in |x| <= limit.
struct SeriesTable {
    Row mu[kMoments]{}, k1{}, k2{}, j{}, q{};

    SeriesTable(int count, double limit) {
        Series e{}, t{}, l{};  // e^x, tanh(x / 2), log cosh(x / 2)
        e[0] = 1;
        for (int n = 1; n < kTerms; ++n) e[n] = e[n - 1] / n;
        for (int n = 1; n < kTerms; ++n) {  // t' = (1 - t^2) / 2 and l' = t / 2
            const Series t2 = multiply(t, t);
            t[n] = ((n == 1) - t2[n - 1]) / (2 * n);
            l[n] = t[n - 1] / (2 * n);
        }
        Series one_and_e = e, xe{}, half = l, quarter{}, of_k1{}, of_k2{}, of_j{};
        one_and_e[0] += 1;
        half[1] += 0.5;  // log((1 + e^x) / 2) = l(x) + x / 2
        const Series mixture = multiply(one_and_e, half);
        for (int n = 1; n < kTerms; ++n) xe[n] = e[n - 1];
        for (int n = 2; n < kTerms; ++n) {
            of_k1[n] = e[n];
            of_k2[n] = xe[n] - e[n];  // B g(-x) = A (x e^x - e^x + 1)
            of_j[n] = (xe[n] - mixture[n]) / 2;
        }
        for (int n = 0; n < kTerms; ++n) quarter[n] = (n == 1 ? 0.25 : 0) - l[n] / 2;
        k1 = economize(of_k1, 2, count, limit), k2 = economize(of_k2, 2, count, limit),
        j = economize(of_j, 2, count, limit);
        q = economize(multiply(e, quarter), 1, count, limit);
        for (int k = 0; k < count; ++k, one_and_e = multiply(one_and_e, t))
            mu[k] = economize(one_and_e, k, count, limit);
    }
};
const SeriesTable kTinySeries(5, kTiny), kMediumSeries(7, kMedium), kSmallSeries(9, kSmall);

double dot(const Row& row, const Moments& moments) {
    double sum = 0;
    for (int n = kMoments - 1; n >= 0; --n) sum += row[n] * moments.m[n];
    return sum;
}

// Polynomials in 0 <= E <= 1 of degree kPowers - 1, through the Chebyshev nodes.
struct PowersTable {
    double node[kPowers], coefficient[kPowers][kPowers];  // [power][node]: what a value at a node adds to a coefficient

    PowersTable() {
        for (int i = 0; i < kPowers; ++i) node[i] = (1 + std::cos(std::numbers::pi * (2 * i + 1) / (2 * kPowers))) / 2;
        for (int i = 0; i < kPowers; ++i) {  // Lagrange's polynomial of node i
            double polynomial[kPowers]{1}, scale = 1;
            for (int other = 0, degree = 0; other < kPowers; ++other) {
                if (other == i) continue;
                ++degree;
                for (int k = degree; k >= 0; --k)
                    polynomial[k] = (k > 0 ? polynomial[k - 1] : 0) - node[other] * polynomial[k];
                scale *= node[i] - node[other];
            }
            for (int k = 0; k < kPowers; ++k) coefficient[k][i] = polynomial[k] / scale;
        }
    }

    // sum H f(E), from sums of H E^k.
    template <class Function>
    double sum(const double* h, Function&& f) const {
        double values[kPowers], total = 0;
        for (int i = 0; i < kPowers; ++i) values[i] = f(node[i]);
        for (int k = 0; k < kPowers; ++k)
            for (int i = 0; i < kPowers; ++i) total += h[k] * coefficient[k][i] * values[i];
        return total;
    }
};
const PowersTable kPowersTable;

double g(double x) { return std::expm1(x) - x; }

// The difference of the maxima.
double top_anchor(const State& state) { return (state.max_b - state.base_b) - (state.max_a - state.base_a); }

// What to subtract from a model's logits, given the largest: nothing where that is small already.
double base(double largest) { return std::abs(largest) <= kWide ? 0 : largest; }

double tau_of(const State& state) {
    const Powers& p = state.powers;
    return state.is_far ? (p.signed_h[0] - p.signed_h[1]) / (p.h[0] + p.h[1]) : state.sums.mu[1] / state.sums.mu[0];
}

struct Found {
    double za, delta, kl_pq, kl_qp, jsd;
    bool is_accurate;
};

Found from_sums(const State& state) {
    const Sums& s = state.sums;
    const double tau = tau_of(state), za = (s.mu[0] - s.mu[1]) / 2, zb = (s.mu[0] + s.mu[1]) / 2;
    const double delta = 2 * std::atanh(tau), shrink = std::exp(-delta);
    const double kl_pq = s.k1 / za - g(delta), kl_qp = s.k2 / zb - g(-delta);

    double series = 0, power = 1;
    for (int k = 1; k < kMoments - 1; ++k) {
        power *= tau;
        series += power / k * ((s.mu[k] - s.mu[k + 1]) + shrink * (s.mu[k] + s.mu[k + 1])) / 2;
    }
    const double jsd = (s.j + (shrink - 1) * s.q + series / 2) / za + std::log1p(-tau * tau) / 2;
    const double left_out = s.mu[kMoments - 1] / za * std::pow(tau, kMoments - 1) / (kMoments - 1);
    // Where delta outweighs the divergence, the subtractions above cost digits.
    constexpr double kNothing = 1e-14;
    const bool is_near = g(std::abs(delta)) <= 30 * std::min(kl_pq, kl_qp) + kNothing;
    const bool is_accurate = std::abs(tau) <= 0.5 && left_out <= 1e-5 * jsd + kNothing && is_near;
    return {.za = za, .delta = delta, .kl_pq = kl_pq, .kl_qp = kl_qp, .jsd = jsd, .is_accurate = is_accurate};
}

// With x > 0, A = H E and B = H; else A = H and B = H E. With r = e^-delta, p = A / Za and q = B r / Za, and
//     2 JSD = sum p log p + q log q - (p + q) log((p + q) / 2),
// every term except H E |x| is H times a function of E.
Found from_powers(const State& state) {
    const Powers& p = state.powers;
    double above[kPowers], below[kPowers];  // x > 0, x <= 0
    for (int k = 0; k < kPowers; ++k) above[k] = (p.h[k] + p.signed_h[k]) / 2, below[k] = (p.h[k] - p.signed_h[k]) / 2;
    const double za = above[1] + below[0], zb = above[0] + below[1];
    const double ax = (p.y[1] + p.signed_y[1]) / 2 - (p.y[0] - p.signed_y[0]) / 2;  // sum A x
    const double bx = (p.y[0] + p.signed_y[0]) / 2 - (p.y[1] - p.signed_y[1]) / 2;
    const double delta = std::log(zb / za), r = za / zb, log2 = std::log(2.0);
    const double kl_pq = delta - ax / za, kl_qp = bx / zb - delta;
    const double linear = (p.y[1] + p.signed_y[1]) / 2 + r * (p.y[1] - p.signed_y[1]) / 2;
    const double log2r = std::log(2 * r);
    const double of_above =
        kPowersTable.sum(above, [&](double e) { return e * log2 + r * log2r - (e + r) * std::log(e + r); });
    const double of_below =
        kPowersTable.sum(below, [&](double e) { return log2 + e * r * log2r - (1 + e * r) * std::log1p(e * r); });
    const double jsd = (of_above + of_below - linear) / (2 * za);
    const bool is_accurate = std::abs(tau_of(state)) <= 0.4 && std::min(kl_pq, kl_qp) > kFar;
    return {.za = za, .delta = delta, .kl_pq = kl_pq, .kl_qp = kl_qp, .jsd = jsd, .is_accurate = is_accurate};
}

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

Sums from_moments(const Moments& moments, float largest) {
    const SeriesTable& series = largest <= kTiny ? kTinySeries : largest <= kMedium ? kMediumSeries : kSmallSeries;
    Sums out;
    for (int k = 0; k < kMoments; ++k) out.mu[k] = dot(series.mu[k], moments);
    out.k1 = dot(series.k1, moments), out.k2 = dot(series.k2, moments);
    out.j = dot(series.j, moments), out.q = dot(series.q, moments);
    return out;
}

Powers operator*(const Powers& p, double factor) {
    Powers out = p;
    for (int k = 0; k < kPowers; ++k) out.h[k] *= factor, out.signed_h[k] *= factor;
    for (int k = 0; k < 2; ++k) out.y[k] *= factor, out.signed_y[k] *= factor;
    return out;
}

Powers operator+(const Powers& p, const Powers& other) {
    Powers out = p;
    for (int k = 0; k < kPowers; ++k) out.h[k] += other.h[k], out.signed_h[k] += other.signed_h[k];
    for (int k = 0; k < 2; ++k) out.y[k] += other.y[k], out.signed_y[k] += other.signed_y[k];
    return out;
}

bool are_far(const State& state) {
    const Found found = from_powers(state);
    return std::min(found.kl_pq, found.kl_qp) > kFar;
}

double better_anchor(const State& state) {
    const double delta = 2 * std::atanh(tau_of(state));
    // Beyond 12, the smaller of Za and Zb is lost in rounding; the difference of the maxima is right to log V.
    return std::abs(delta) <= 12 ? state.anchor + delta : top_anchor(state);
}

bool metrics(const State& state, std::int64_t vocab, float* out, std::int64_t stride) {
    if (state.phase == kMeasuring) return false;
    const Found found = state.is_far ? from_powers(state) : from_sums(state);
    if (!found.is_accurate && state.runs < kMaxRuns) return false;

    const double log_z = state.reference / kLog2e + std::log(found.za), log_za = log_z + state.rounding_a,
                 log_zb = log_z + state.anchor + found.delta + state.rounding_b;
    const double target_a = state.target_a - state.base_a, target_b = state.target_b - state.base_b;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const double values[8] = {
        std::max(found.kl_pq, 0.0),
        std::max(found.kl_qp, 0.0),
        std::clamp(found.jsd, 0.0, std::log(2.0)),
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
        next.is_far = state.is_far && are_far(state);
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
