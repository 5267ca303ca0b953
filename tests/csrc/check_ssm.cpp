// The convolution and the recurrences against double.
#include <cmath>
#include <limits>

#include "check.h"
#include "ssm/conv/causal_conv1d.h"
#include "ssm/delta/gated_delta_rule.h"
#include "ssm/scan/scan.h"

namespace klfast::test {
namespace {

constexpr Int kBatch = 2, kGroups = 2, kLength = 71, kStates = 5;

Tensor negative(DType dtype, std::vector<Int> shape) {
    Tensor made = Tensor::random(dtype, std::move(shape));
    for (Int i = 0; i < made.size(); ++i) made.set(i, -std::abs(made[i]));
    return made;
}

// One step of a channel's recurrence: updates h, returns y before the gate.
double step(double* h, double dt, double x, double d, const auto& a, const auto& b, const auto& c) {
    double y = d * x;
    for (Int n = 0; n < kStates; ++n) {
        h[n] = std::exp(dt * a(n)) * h[n] + dt * x * b(n);
        y += c(n) * h[n];
    }
    return y;
}

void check_selective_scan(DType dtype, bool constant_b, bool constant_c) {
    constexpr Int channels = 2 * 19, rows = kBatch * channels;
    const auto coefficients = [](bool constant) {
        return constant ? std::vector<Int>{channels, kStates} : std::vector<Int>{kBatch, kGroups, kStates, kLength};
    };
    Tensor u = Tensor::random(dtype, {kBatch, channels, kLength}),
           delta = Tensor::random(dtype, {kBatch, channels, kLength}),
           z = Tensor::random(dtype, {kBatch, channels, kLength}), a = negative(DType::f32, {channels, kStates}),
           b = Tensor::random(dtype, coefficients(constant_b)), c = Tensor::random(dtype, coefficients(constant_c)),
           d = Tensor::random(DType::f32, {channels}), bias = Tensor::random(DType::f32, {channels}),
           initial = Tensor::random(DType::f32, {kBatch, channels, kStates});
    std::vector<double> y(rows * kLength), state(rows * kStates);
    for (Int row = 0; row < rows; ++row) {
        const Int channel = row % channels, group = row / channels * kGroups + channel / (channels / kGroups);
        double* const h = state.data() + row * kStates;
        for (Int n = 0; n < kStates; ++n) h[n] = initial[row * kStates + n];
        for (Int t = 0; t < kLength; ++t) {
            const Int i = row * kLength + t;
            const auto of = [&](const Tensor& all, bool constant) {
                return [&all, channel, group, t, constant](Int n) {
                    return all[constant ? channel * kStates + n : (group * kStates + n) * kLength + t];
                };
            };
            y[i] =
                silu(z[i]) * step(
                                 h, softplus(delta[i] + bias[channel]), u[i], d[channel],
                                 [&](Int n) { return a[channel * kStates + n]; }, of(b, constant_b), of(c, constant_c));
        }
    }
    for_tiers("selective_scan", [&](Tier tier) {
        Tensor out(dtype, {kBatch, channels, kLength}), last(DType::f32, {kBatch, channels, kStates});
        const SelectiveScanArgs args{
            .u = u.view(),
            .delta = delta.view(),
            .z = z.view(),
            .out = out.view(),
            .a = a.view(),
            .b = b.view(),
            .c = c.view(),
            .d = d.view(),
            .delta_bias = bias.view(),
            .initial = initial.view(),
            .state = last.view(),
            .batch = kBatch,
            .channels = channels,
            .length = kLength,
            .groups = constant_b && constant_c ? 1 : kGroups,
            .states = kStates,
            .constant_b = constant_b,
            .constant_c = constant_c,
            .softplus = true,
            .n_threads = kThreads,
        };
        call([&] { selective_scan(args, tier); });
        compare("selective_scan", tier, out, y);
        compare("selective_scan", tier, last, state);
    });
}

constexpr Int kHeads = 2 * 3, kDim = 19, kRows = kBatch * kHeads * kDim;

// With slots, the first entry's state is the last of a cache, and the second has none.
constexpr Int kCache = 4, kPadding = 7, kSlots[kBatch] = {kCache - 1, kPadding};

void check_state_update(DType dtype, Slots slots) {
    Tensor before = Tensor::random(DType::f32, {kCache, kHeads, kDim, kStates}),
           x = Tensor::random(dtype, {kBatch, kHeads, kDim}), dt = Tensor::random(dtype, {kBatch, kHeads, kDim}),
           z = Tensor::random(dtype, {kBatch, kHeads, kDim}), a = negative(DType::f32, {kHeads, kDim, kStates}),
           b = Tensor::random(dtype, {kBatch, kGroups, kStates}), c = Tensor::random(dtype, {kBatch, kGroups, kStates}),
           d = Tensor::random(DType::f32, {kHeads, kDim}), bias = Tensor::random(DType::f32, {kHeads, kDim});
    std::vector<double> y(kRows), state(before.size());
    for (Int i = 0; i < before.size(); ++i) state[i] = before[i];
    for (Int row = 0; row < kRows; ++row) {
        const Int channel = row % (kHeads * kDim), head = channel / kDim, batch = row / (kHeads * kDim),
                  group = batch * kGroups + head / (kHeads / kGroups);
        if (slots.skips(batch)) continue;
        double* const h = state.data() + (slots[batch] * kHeads * kDim + channel) * kStates;
        y[row] = silu(z[row]) * step(
                                    h, softplus(dt[row] + bias[channel]), x[row], d[channel],
                                    [&](Int n) { return a[channel * kStates + n]; },
                                    [&](Int n) { return b[group * kStates + n]; },
                                    [&](Int n) { return c[group * kStates + n]; });
    }
    for_tiers("selective_state_update", [&](Tier tier) {
        Tensor after = before, out(dtype, {kBatch, kHeads, kDim});
        const StateUpdateArgs args{
            .state = after.view(),
            .x = x.view(),
            .dt = dt.view(),
            .z = z.view(),
            .out = out.view(),
            .a = a.view(),
            .b = b.view(),
            .c = c.view(),
            .d = d.view(),
            .dt_bias = bias.view(),
            .slots = slots,
            .batch = kBatch,
            .heads = kHeads,
            .dim = kDim,
            .groups = kGroups,
            .states = kStates,
            .softplus = true,
            .a_is_log = false,
            .n_threads = kThreads,
        };
        call([&] { selective_state_update(args, tier); });
        compare("selective_state_update", tier, out, y);
        compare("selective_state_update", tier, after, state);
    });
}

// A state that fades below float32's normal numbers ends at 0.
void check_faded_state() {
    Tensor before(DType::f32, {1, 1, 1, kStates}), zeros(DType::f32, {1, 1, kStates}), one(DType::f32, {1, 1, 1}),
        a(DType::f32, {1, 1, kStates});
    one.set(0, 1);
    for (Int n = 0; n < kStates; ++n) before.set(n, 2e-38), zeros.set(n, 0), a.set(n, -1);
    for_tiers("selective_state_update", [&](Tier tier) {
        Tensor after = before, out(DType::f32, {1, 1, 1});
        const StateUpdateArgs args{
            .state = after.view(),
            .x = zeros.view(),
            .dt = one.view(),
            .z = {},
            .out = out.view(),
            .a = a.view(),
            .b = zeros.view(),
            .c = zeros.view(),
            .d = {},
            .dt_bias = {},
            .batch = 1,
            .heads = 1,
            .dim = 1,
            .groups = 1,
            .states = kStates,
            .softplus = false,
            .a_is_log = false,
            .n_threads = 1,
        };
        selective_state_update(args, tier);
        compare("selective_state_update", tier, after, std::vector<double>(kStates));
    });
}

void check_chunk_scan(DType dtype) {
    Tensor x = Tensor::random(dtype, {kBatch, kLength, kHeads, kDim}),
           z = Tensor::random(dtype, {kBatch, kLength, kHeads, kDim}),
           dt = Tensor::random(dtype, {kBatch, kLength, kHeads}), a = negative(DType::f32, {kHeads}),
           bias = Tensor::random(DType::f32, {kHeads}), b = Tensor::random(dtype, {kBatch, kLength, kGroups, kStates}),
           c = Tensor::random(dtype, {kBatch, kLength, kGroups, kStates}),
           d = Tensor::random(DType::f32, {kHeads, kDim}),
           initial = Tensor::random(DType::f32, {kBatch, kHeads, kDim, kStates});
    std::vector<double> y(kRows * kLength), state(kRows * kStates);
    for (Int row = 0; row < kRows; ++row) {
        const Int channel = row % (kHeads * kDim), head = channel / kDim, batch = row / (kHeads * kDim);
        double* const h = state.data() + row * kStates;
        for (Int n = 0; n < kStates; ++n) h[n] = initial[row * kStates + n];
        for (Int t = 0; t < kLength; ++t) {
            const Int time = batch * kLength + t, i = time * kHeads * kDim + channel,
                      group = time * kGroups + head / (kHeads / kGroups);
            y[i] = silu(z[i]) * step(
                                    h, softplus(dt[time * kHeads + head] + bias[head]), x[i], d[channel],
                                    [&](Int) { return a[head]; }, [&](Int n) { return b[group * kStates + n]; },
                                    [&](Int n) { return c[group * kStates + n]; });
        }
    }
    for_tiers("mamba_chunk_scan", [&](Tier tier) {
        Tensor out(dtype, {kBatch, kLength, kHeads, kDim}), last(DType::f32, {kBatch, kHeads, kDim, kStates});
        const ChunkScanArgs args{
            .x = x.view(),
            .z = z.view(),
            .out = out.view(),
            .dt = dt.view(),
            .a = a.view(),
            .dt_bias = bias.view(),
            .b = b.view(),
            .c = c.view(),
            .d = d.view(),
            .initial = initial.view(),
            .final = last.view(),
            .batch = kBatch,
            .length = kLength,
            .heads = kHeads,
            .dim = kDim,
            .groups = kGroups,
            .states = kStates,
            .softplus = true,
            .dt_min = 0.0f,
            .dt_max = std::numeric_limits<float>::infinity(),
            .n_threads = kThreads,
        };
        call([&] { mamba_chunk_scan(args, tier); });
        compare("mamba_chunk_scan", tier, out, y);
        compare("mamba_chunk_scan", tier, last, state);
    });
}

// A result beyond float32 has a head begin again, from the same state, though the last one replaces that.
void check_chunk_scan_in_place() {
    const auto filled = [](std::vector<Int> shape, double value) {
        Tensor made(DType::f32, std::move(shape));
        for (Int i = 0; i < made.size(); ++i) made.set(i, value);
        return made;
    };
    Tensor x = filled({1, 1, 1, 1}, 1e38), dt = filled({1, 1, 1}, 0.5), a = filled({1}, -1),
           b = filled({1, 1, 1, 1}, 1), c = filled({1, 1, 1, 1}, 0), d = filled({1, 1}, 10),
           before = filled({1, 1, 1, 1}, 4e37);
    for_tiers("mamba_chunk_scan", [&](Tier tier) {
        Tensor out(DType::f32, {1, 1, 1, 1}), state = before;
        const ChunkScanArgs args{
            .x = x.view(),
            .z = {},
            .out = out.view(),
            .dt = dt.view(),
            .a = a.view(),
            .dt_bias = {},
            .b = b.view(),
            .c = c.view(),
            .d = d.view(),
            .initial = state.view(),
            .final = state.view(),
            .batch = 1,
            .length = 1,
            .heads = 1,
            .dim = 1,
            .groups = 1,
            .states = 1,
            .softplus = false,
            .dt_min = 0.0f,
            .dt_max = 1.0f,
            .n_threads = 1,
        };
        call([&] { mamba_chunk_scan(args, tier); });
        compare("mamba_chunk_scan", tier, state, {std::exp(-0.5) * 4e37 + 0.5 * 1e38});
    });
}

void check_conv(DType dtype, Int channels, Int width) {
    Tensor x = Tensor::random(dtype, {kBatch, channels, kLength}), weight = Tensor::random(dtype, {channels, width}),
           bias = Tensor::random(DType::f32, {channels}),
           initial = Tensor::random(dtype, {kBatch, channels, width - 1});
    std::vector<double> y(x.size());
    for (Int row = 0; row < kBatch * channels; ++row)
        for (Int t = 0; t < kLength; ++t) {
            double sum = bias[row % channels];
            for (Int k = 0; k < width; ++k) {
                const Int at = t + k - (width - 1);
                sum += weight[row % channels * width + k] *
                       (at < 0 ? initial[row * (width - 1) + at + width - 1] : x[row * kLength + at]);
            }
            y[row * kLength + t] = silu(sum);
        }
    for_tiers("causal_conv1d", [&](Tier tier) {
        Tensor out(dtype, {kBatch, channels, kLength});
        const ConvArgs args{
            .x = x.view(),
            .out = out.view(),
            .weight = weight.view(),
            .bias = bias.view(),
            .initial = initial.view(),
            .final = {},
            .batch = kBatch,
            .channels = channels,
            .length = kLength,
            .width = width,
            .initial_length = width - 1,
            .final_length = 0,
            .silu = true,
            .n_threads = kThreads,
        };
        call([&] { causal_conv1d(args, tier); });
        compare("causal_conv1d", tier, out, y);
    });
}

// A cache of states that move on or, as rings, start over; longer than the past that the convolution needs.
void check_conv_update(DType dtype, Int channels, Int length, bool rings) {
    constexpr Int width = 4, held = 9, seen[kBatch] = {5, 1000};
    const Slots slots{.of = kSlots, .padding = kPadding};
    Tensor x = Tensor::random(dtype, {kBatch, channels, length}), weight = Tensor::random(dtype, {channels, width}),
           before = Tensor::random(dtype, {kCache, channels, held});
    std::vector<double> y(x.size()), state(before.size());
    for (Int i = 0; i < before.size(); ++i) state[i] = before[i];
    const auto place = [&](Int b, Int t) { return rings ? (seen[b] + t + held) % held : held + t; };
    for (Int row = 0; row < kBatch * channels; ++row) {
        const Int b = row / channels, channel = row % channels;
        if (slots.skips(b)) continue;
        const Int first = (slots[b] * channels + channel) * held;
        const auto at = [&](Int t) { return t < 0 ? before[first + place(b, t)] : x[row * length + t]; };
        for (Int t = 0; t < length; ++t)
            for (Int k = 0; k < width; ++k)
                y[row * length + t] += weight[channel * width + k] * at(t + k - (width - 1));
        if (rings)
            for (Int t = 0; t < length; ++t) state[first + place(b, t)] = x[row * length + t];
        else
            for (Int j = 0; j < held; ++j) state[first + j] = at(length - held + j);
    }
    for_tiers("causal_conv1d_update", [&](Tier tier) {
        Tensor out(dtype, {kBatch, channels, length}), after = before;
        const ConvArgs args{
            .x = x.view(),
            .out = out.view(),
            .weight = weight.view(),
            .bias = {},
            .initial = after.view(),
            .final = after.view(),
            .slots = slots,
            .steps_seen = rings ? seen : nullptr,
            .batch = kBatch,
            .channels = channels,
            .length = length,
            .width = width,
            .initial_length = held,
            .final_length = held,
            .silu = false,
            .n_threads = kThreads,
        };
        call([&] { causal_conv1d(args, tier); });
        compare("causal_conv1d_update", tier, out, y);
        compare("causal_conv1d_update", tier, after, state);
    });
}

void check_delta_rule(DType dtype, bool by_channel, Int value_dim) {
    constexpr Int key_heads = 2, heads = 2 * key_heads, key_dim = 21;
    Tensor q = Tensor::random(dtype, {kBatch, kLength, key_heads, key_dim}),
           k = Tensor::random(dtype, {kBatch, kLength, key_heads, key_dim}),
           v = Tensor::random(dtype, {kBatch, kLength, heads, value_dim}),
           g = negative(DType::f32, by_channel ? std::vector<Int>{kBatch, kLength, heads, key_dim}
                                               : std::vector<Int>{kBatch, kLength, heads}),
           beta = Tensor::random(dtype, {kBatch, kLength, heads}, 0.3),
           before = Tensor::random(DType::f32, {kBatch, heads, key_dim, value_dim});
    std::vector<double> out(v.size()), state(before.size());
    for (Int i = 0; i < before.size(); ++i) state[i] = before[i];
    for (Int row = 0; row < kBatch * heads; ++row)
        for (Int t = 0; t < kLength; ++t) {
            const Int time = row / heads * kLength + t, head = row % heads,
                      key = (time * key_heads + head / (heads / key_heads)) * key_dim, one = time * heads + head;
            double squares_q = 1e-6, squares_k = 1e-6;
            for (Int i = 0; i < key_dim; ++i)
                squares_q += q[key + i] * q[key + i], squares_k += k[key + i] * k[key + i];
            for (Int j = 0; j < value_dim; ++j) {
                double held = 0, read = 0;
                double* const s = state.data() + row * key_dim * value_dim + j;
                for (Int i = 0; i < key_dim; ++i) {
                    s[i * value_dim] *= std::exp(by_channel ? g[one * key_dim + i] : g[one]);
                    held += s[i * value_dim] * k[key + i] / std::sqrt(squares_k);
                }
                const double change = beta[one] * (v[one * value_dim + j] - held);
                for (Int i = 0; i < key_dim; ++i) {
                    s[i * value_dim] += change * k[key + i] / std::sqrt(squares_k);
                    read += s[i * value_dim] * q[key + i] / std::sqrt(squares_q);
                }
                out[one * value_dim + j] = 0.25 * read;
            }
        }
    for_tiers("gated_delta_rule", [&](Tier tier) {
        Tensor after = before, got(dtype, {kBatch, kLength, heads, value_dim});
        const GatedDeltaRuleArgs args{
            .q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .out = got.view(),
            .g = g.view(),
            .beta = beta.view(),
            .state = after.view(),
            .batch = kBatch,
            .length = kLength,
            .key_heads = key_heads,
            .heads = heads,
            .key_dim = key_dim,
            .value_dim = value_dim,
            .normalize = true,
            .scale = 0.25f,
            .n_threads = kThreads,
        };
        call([&] { gated_delta_rule(args, tier); });
        compare("gated_delta_rule", tier, got, out);
        compare("gated_delta_rule", tier, after, state);
    });
}

}  // namespace

void check_conv() {
    for (const DType dtype : kTypes)
        for (const Int width : {1, 2, 3, 4, 6})
            for (const Int channels : {1, 37, 301}) check_conv(dtype, channels, width);
    for (const DType dtype : kTypes)
        for (const bool rings : {false, true})
            for (const Int length : {1, 5, 40}) check_conv_update(dtype, 37, length, rings);
}

void check_scan() {
    check_faded_state();
    check_chunk_scan_in_place();
    for (const DType dtype : kTypes) {
        for (const bool constant_b : {false, true})
            for (const bool constant_c : {false, true}) check_selective_scan(dtype, constant_b, constant_c);
        check_state_update(dtype, {});
        check_state_update(dtype, {.of = kSlots, .padding = kPadding});
        check_chunk_scan(dtype);
    }
}

void check_delta() {
    for (const DType dtype : kTypes)
        for (const bool by_channel : {false, true})
            for (const Int value_dim : {5, 64, 83}) check_delta_rule(dtype, by_channel, value_dim);
}

}  // namespace klfast::test
