// Metrics from what GPU kernels leave of the rows.
#include <algorithm>
#include <cmath>

#include "divergence/divergence.h"
#include "core/parallel.h"

namespace klfast::divergence {
namespace {

// The kernels take the student's weights from b - anchor - R in float32, which is wrong by 2^-24 of the largest of
// these.
constexpr double kLargest = 256;

Sums sums_of(const Part& part) {
    Sums sums;
    std::copy(std::begin(part.mu), std::end(part.mu), sums.mu);
    sums.k1 = part.k1, sums.k2 = part.k2, sums.j = part.j, sums.q = part.q;
    return sums;
}

bool is_finite(const Part& p) {
    double sum = p.k1 + p.k2 + p.j + p.q + p.sum_a2 + p.sum_d2 + p.max_a + p.max_b + p.reference;
    for (float mu : p.mu) sum += mu;
    return std::isfinite(sum);
}

// Notes the rounding error of the target's weights as find_rounding in divergence.cpp does, with the kernels'
// operations, where the target is a model's most likely entry and in this part: of others, one logit is unknown here.
void find_rounding(State& state, const Part& part) {
    const auto a = static_cast<float>(state.target_a), b = static_cast<float>(state.target_b),
               anchor = static_cast<float>(state.anchor);
    const double x = (b - a) - anchor, larger = std::max(a - part.reference, (b - anchor) - part.reference);
    if (state.target_a == state.max_a && part.max_a == state.max_a)
        state.rounding_a = state.target_a - part.reference - (larger - std::max(x, 0.0));
    if (state.target_b == state.max_b && part.max_b == state.max_b)
        state.rounding_b = state.target_b - state.anchor - part.reference - (larger + std::min(x, 0.0));
}

// Adds all parts of a row to a state that has seen none; false if they cannot be used.
bool add_parts(State& state, const Part* parts, const PartIndex* index, std::int64_t n_parts) {
    double reference = parts[0].reference;
    state.max_a = parts[0].max_a, state.max_b = parts[0].max_b;
    for (std::int64_t i = 0; i < n_parts; ++i) {
        if (!is_finite(parts[i])) return false;
        reference = std::max<double>(reference, parts[i].reference);
        state.max_a = std::max<double>(state.max_a, parts[i].max_a),
        state.max_b = std::max<double>(state.max_b, parts[i].max_b);
    }
    if (std::abs(state.max_a) > kLargest || std::abs(state.max_b) > kLargest) return false;
    state.reference = reference * kLog2e;
    for (std::int64_t i = n_parts; i-- > 0;) {  // the first of equals last
        state.sums = state.sums + sums_of(parts[i]) * std::exp(parts[i].reference - reference);
        state.sum_a2 += parts[i].sum_a2, state.sum_d2 += parts[i].sum_d2;
        if (parts[i].max_a == state.max_a) state.argmax_a = index[i].argmax_a;
        if (parts[i].max_b == state.max_b) state.argmax_b = index[i].argmax_b;
        find_rounding(state, parts[i]);
    }
    return true;
}

Verdict measure(const PartsArgs& args, std::int64_t token, float* out) {
    State state{};
    state.anchor = args.anchor[token], state.runs = args.runs[token];
    if (args.targets != nullptr) {
        state.target_a = args.targets[2 * token], state.target_b = args.targets[2 * token + 1];
        state.has_target = !std::isnan(state.target_a);
    }
    if (!add_parts(state, args.parts + token * args.n_parts, args.index + token * args.n_parts, args.n_parts))
        return Verdict::wide;
    const bool is_near = std::abs(state.anchor) <= kWide;
    if (is_near && metrics(state, args.vocab, out + token, args.tokens)) return Verdict::done;
    if (!is_near) state.sums.mu[1] = state.sums.mu[0];  // such sums ask for the difference of the maxima as the anchor
    restart(state);
    if (state.phase != kPlain) return Verdict::wide;
    args.anchor[token] = static_cast<float>(state.anchor), args.runs[token] = state.runs;
    return Verdict::again;
}

}  // namespace

void from_parts(const PartsArgs& args, float* out, Verdict* verdict) {
    parallel_for(args.tokens, 32, args.n_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t token = begin; token < end; ++token) verdict[token] = measure(args, token, out);
    });
}

}  // namespace klfast::divergence
