#include "divergence/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <utility>

#include "core/parallel.h"

namespace klfast::divergence {
namespace {

// n logits from column `column` of a row as contiguous floats: in place, or in `buffer`.
const float* floats(const Matrix& m, std::int64_t row, std::int64_t column, int n, float* buffer,
                    const Kernels& kernels) {
    const std::int64_t offset = row * m.row_stride + column * m.column_stride;
    if (m.column_stride != 1) {
        for (int i = 0; i < n; ++i) buffer[i] = load_float(m.data, offset + i * m.column_stride, m.dtype);
        return buffer;
    }
    const void* from = static_cast<const char*>(m.data) + offset * size_of(m.dtype);
    if (m.dtype == DType::f32) return static_cast<const float*>(from);
    kernels.widen(from, m.dtype, n, buffer);
    return buffer;
}

int find(const float* values, int n, float wanted) {
    int i = 0;
    for (bool here = false; i + 16 <= n; i += 16) {  // 16 at a time, which the compiler takes as vectors
        for (int k = 0; k < 16; ++k) here |= values[i + k] == wanted;
        if (here) break;
    }
    for (; i < n; ++i)
        if (values[i] == wanted) return i;
    return 0;
}

// The first logit that is not finite; 0 if all are.
Fault find_fault(const float* a, const float* b, int n, std::int64_t first_column) {
    for (int i = 0; i < n; ++i)
        for (int student = 0; student < 2; ++student)
            if (!std::isfinite(student ? b[i] : a[i])) return 1 + 2 * (first_column + i) + student;
    return 0;
}

// Sums of squares in double, for logits whose squares leave float32's range.
void sum_squares(const float* a, const float* b, int n, State& state) {
    for (int i = 0; i < n; ++i) {
        const double u = a[i], d = b[i] - u;
        state.sum_a2 += u * u, state.sum_d2 += d * d;
    }
}

void set_reference(State& state, const Scan& scan) {
    const double largest = std::max<double>(scan.max_a, scan.max_b - state.anchor);
    const double needed = static_cast<float>(std::ceil(largest * kLog2e));
    if (state.columns == 0) {
        state.reference = needed;
    } else if (needed > state.reference) {
        state.sums = state.sums * std::exp2(state.reference - needed);
        state.powers = state.powers * std::exp2(state.reference - needed);
        state.reference = needed;
    }
}

float largest_x(const State& state, const Scan& scan) {
    const auto anchor = static_cast<float>(state.anchor);
    return std::max(scan.max_d - anchor, anchor - scan.min_d);
}

// Whether a block's weights cannot be told from its logits as they are; see token_state.h.
bool is_wide(const State& state, const Scan& scan) {
    constexpr double kLargest = 0x1p21, kSquares = 1e34;  // M is exact as a float, a log2 e - M finite
    const double largest = std::max<double>(scan.max_a, scan.max_b - state.anchor);
    return !(largest_x(state, scan) <= kWide && std::abs(state.anchor) <= kWide && std::abs(largest) <= kLargest &&
             scan.sum_a2 <= kSquares);
}

Sums block_sums(const State& state, const float* a, const float* b, int n, const Scan& scan, const Kernels& kernels) {
    const auto anchor = static_cast<float>(state.anchor), reference = static_cast<float>(state.reference);
    const float largest = largest_x(state, scan);
    if (largest <= kSmall) {
        Moments moments;
        kernels.moments(a, b, n, anchor, reference, largest, moments);
        return from_moments(moments, largest);
    }
    Sums sums;
    (largest <= kWide ? kernels.sums : kernels.wide_sums)(a, b, n, anchor, reference, sums);
    return sums;
}

Powers block_powers(const State& state, const float* a, const float* b, int n, const Kernels& kernels) {
    Powers powers;
    kernels.powers(a, b, n, static_cast<float>(state.anchor), static_cast<float>(state.reference), powers);
    return powers;
}

void find_maxima(State& state, const float* a, const float* b, int n, const Scan& scan, std::int64_t first_column) {
    if (state.columns == 0 || scan.max_a > state.max_a) {
        state.argmax_a = first_column + find(a, n, scan.max_a);
        state.max_a = scan.max_a;
    }
    if (state.columns == 0 || scan.max_b > state.max_b) {
        state.argmax_b = first_column + find(b, n, scan.max_b);
        state.max_b = scan.max_b;
    }
}

// Notes the rounding error of the most likely entries' weights, if they are in this block; see token_state.h. The
// operations are those of vector_loops.h: `wide` as in add_sums.
void find_rounding(State& state, const float* a, const float* b, int n, std::int64_t first_column, bool wide) {
    const auto anchor = static_cast<float>(state.anchor), reference = static_cast<float>(state.reference);
    const auto fma_log2e = [](float x, float c) { return static_cast<float>(static_cast<double>(x) * kLog2e + c); };
    // Of entry i, log H, and x as E has it.
    const auto rounded = [&](std::int64_t i) -> std::pair<double, double> {
        const float x = (b[i] - a[i]) - anchor, of_a = fma_log2e(a[i], -reference);
        if (state.is_far) {
            const float scaled = x * kLog2e;
            return {(of_a + std::max(scaled, 0.0f)) * std::numbers::ln2, scaled * std::numbers::ln2};
        }
        const float larger =
            wide ? std::max(of_a, fma_log2e(b[i], -(reference + anchor * kLog2e))) : fma_log2e(std::max(x, 0.0f), of_a);
        return {larger * std::numbers::ln2, x};
    };
    const double log_reference = state.reference / kLog2e;
    if (const auto i = state.argmax_a - first_column; 0 <= i && i < n) {
        const auto [larger, x] = rounded(i);
        state.rounding_a = a[i] - log_reference - (larger - std::max(x, 0.0));
    }
    if (const auto i = state.argmax_b - first_column; 0 <= i && i < n) {
        const auto [larger, x] = rounded(i);
        state.rounding_b = b[i] - state.anchor - log_reference - (larger + std::min(x, 0.0));
    }
}

// An anchor from a row's first columns: the difference at the most likely token, then what that yields for all of them.
void find_anchor(State& state, const float* a, const float* b, int n, const Scan& scan, std::int64_t first_column,
                 const Kernels& kernels) {
    const auto top = state.argmax_a - first_column;
    state.anchor = b[top] - a[top];
    state.has_anchor = 1;
    if (is_wide(state, scan)) return;
    set_reference(state, scan);
    if (largest_x(state, scan) > kSmall) {
        state.powers = block_powers(state, a, b, n, kernels);
        state.is_far = 1;  // as far as the anchor goes
        state.anchor = static_cast<float>(better_anchor(state));
        state.is_far = are_far(state);
        state.powers = Powers{};
    } else {
        state.sums = block_sums(state, a, b, n, scan, kernels);
        state.anchor = static_cast<float>(better_anchor(state));
        state.sums = Sums{};
    }
}

// At most kColumns columns into one state.
void add(State& state, const float* a, const float* b, int n, std::int64_t first_column, const Kernels& kernels) {
    Scan scan;
    kernels.scan(a, b, n, scan);
    if (std::isfinite(scan.sum_a2 + scan.sum_d2)) {
        state.sum_a2 += scan.sum_a2;
        state.sum_d2 += scan.sum_d2;
    } else {
        state.fault = find_fault(a, b, n, first_column);
        if (state.fault) return;
        sum_squares(a, b, n, state);
        state.phase = kMeasuring;
    }
    find_maxima(state, a, b, n, scan, first_column);
    if (state.phase == kPlain) {
        if (!state.has_anchor) find_anchor(state, a, b, n, scan, first_column, kernels);
        if (is_wide(state, scan)) state.phase = kMeasuring;
    }
    if (state.phase == kPlain) {
        set_reference(state, scan);
        find_rounding(state, a, b, n, first_column, false);
        if (state.is_far)
            state.powers = state.powers + block_powers(state, a, b, n, kernels);
        else
            state.sums = state.sums + block_sums(state, a, b, n, scan, kernels);
    }
    state.columns += n;
}

// Logits relative to the bases, in place or from elsewhere. Entries of no weight in either model become equal, so that
// they add nothing. Returns whether all of the others are finite.
bool shift(const State& state, const float* a, const float* b, int n, float* to_a, float* to_b) {
    const auto base_a = static_cast<float>(state.base_a), base_b = static_cast<float>(state.base_b);
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    bool finite = true;
    for (int i = 0; i < n; ++i) {
        const float u = a[i] - base_a, v = b[i] - base_b;
        const bool dead = (u > v ? u : v) < kDead;
        finite &= dead | ((u >= kLowest) & (v >= kLowest));
        to_a[i] = dead ? kDead : u, to_b[i] = dead ? kDead : v;
    }
    return finite;
}

// As add, of logits relative to the bases.
void add_shifted(State& state, const float* a, const float* b, int n, std::int64_t first_column,
                 const Kernels& kernels) {
    Scan scan;
    kernels.scan(a, b, n, scan);
    find_rounding(state, a, b, n, first_column, largest_x(state, scan) > kWide);
    state.sums = state.sums + block_sums(state, a, b, n, scan, kernels);
    state.columns += n;
}

void add_row(State& state, const BlockArgs& args, std::int64_t token, const Kernels& kernels) {
    if (state.fault) return;
    alignas(64) float a_buffer[kColumns], b_buffer[kColumns];
    for (std::int64_t start = 0; start < args.columns && !state.fault; start += kColumns) {
        const int n = static_cast<int>(std::min<std::int64_t>(kColumns, args.columns - start));
        const float* a = floats(args.teacher, token, start, n, a_buffer, kernels);
        const float* b = floats(args.student, token, start, n, b_buffer, kernels);
        if (state.phase != kShifted) {
            add(state, a, b, n, args.first_column + start, kernels);
        } else if (shift(state, a, b, n, a_buffer, b_buffer)) {
            add_shifted(state, a_buffer, b_buffer, n, args.first_column + start, kernels);
        } else {
            state.fault = -find_fault(a_buffer, b_buffer, n, args.first_column + start);
        }
    }
    if (args.targets == nullptr) return;
    const std::int64_t column = args.targets[token] - args.first_column;
    if (column < 0 || column >= args.columns) return;
    const auto logit = [&](const Matrix& m) {
        return load_float(m.data, token * m.row_stride + column * m.column_stride, m.dtype);
    };
    state.target_a = logit(args.teacher);
    state.target_b = logit(args.student);
    state.has_target = 1;
}

}  // namespace

void accumulate(const BlockArgs& args, Tier limit) {
    const Kernels& kernels = best_kernels(limit);
    parallel_for(args.tokens, 1, args.n_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t token = begin; token < end; ++token) add_row(args.states[token], args, token, kernels);
    });
}

std::int64_t finish(State* states, std::int64_t tokens, std::int64_t vocab, float* out, Fault* fault, bool* rerun) {
    std::int64_t left = 0;
    for (std::int64_t token = 0; token < tokens; ++token) {
        fault[token] = states[token].fault;
        rerun[token] = !fault[token] && !metrics(states[token], vocab, out + token, tokens);
        if (rerun[token]) restart(states[token]);
        left += rerun[token];
    }
    return left;
}

void logit_divergence(const BlockArgs& args, float* out, Fault* fault, Tier limit) {
    const Kernels& kernels = best_kernels(limit);
    parallel_for(args.tokens, 1, args.n_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t token = begin; token < end; ++token) {
            State state{};
            for (add_row(state, args, token, kernels);
                 !state.fault && !metrics(state, args.columns, out + token, args.tokens);) {
                restart(state);
                add_row(state, args, token, kernels);
            }
            fault[token] = state.fault;
        }
    });
}

}  // namespace klfast::divergence
