// RMS normalisation over Vec: each row once from memory into floats in L1, once out.
#pragma once

#include <cmath>
#include <cstdint>

#include "norm/rms_norm.h"
#include "core/parallel.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

inline void run(const RmsNormArgs& a) {
    const std::int64_t n = a.channels, size = a.group_size, padded = round_up(size, kLanes),
                       groups = n / (size ? size : 1);
    const int threads = worthwhile_threads(a.n_threads, 5.0 * a.rows * a.rows_inner * n);
    parallel_for(a.rows * a.rows_inner, 16, threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scratch(round_up(n, kLanes) + kLanes + 2 * padded);
        float* const v = scratch.data;        // [padded]
        float* const gate = v + padded;       // [padded]
        float* const weight = gate + padded;  // [n], and a vector that the last group's may reach into
        if (a.weight) load_tile(weight, 0, a.weight, 0, a.weight.stride[0], 0, n, 1);
        for (std::int64_t i = 0; i < n; ++i) weight[i] = (a.weight ? weight[i] : 1.0f) + a.weight_offset;
        const bool gate_first = a.gate && !a.norm_before_gate, gate_last = a.gate && a.norm_before_gate;
        const auto activated = [&](std::int64_t i) {
            const Vec x = load(gate + i);
            return a.sigmoid_gate ? sigmoid(x) : silu(x);
        };
        for (std::int64_t row = begin; row < end; ++row) {
            for (std::int64_t g = 0; g < groups; ++g) {
                const auto at = [&](const View& t) {
                    return row / a.rows_inner * t.stride[0] + row % a.rows_inner * t.stride[1] + g * size * t.stride[2];
                };
                load_tile(v, padded, a.x, at(a.x), a.x.stride[2], 0, size, 1);
                if (a.gate) load_tile(gate, padded, a.gate, at(a.gate), a.gate.stride[2], 0, size, 1);
                Vec squares = set(0.0f);
                for (std::int64_t i = 0; i < padded; i += kLanes) {
                    Vec x = load(v + i);
                    if (gate_first) x = x * activated(i), store(v + i, x);
                    squares = fma(x, x, squares);
                }
                const Vec scale = set(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + a.eps));
                for (std::int64_t i = 0; i < padded; i += kLanes) {
                    const Vec y = load(v + i) * scale * load(weight + g * size + i);
                    store(v + i, gate_last ? y * activated(i) : y);
                }
                store_tile(v, padded, a.out, at(a.out), a.out.stride[2], 0, size, 1);
            }
        }
    });
}

}  // namespace
}  // namespace klfast
