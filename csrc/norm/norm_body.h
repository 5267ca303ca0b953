// RMS normalisation over Vec: each row once from memory into floats in L1, once out.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "norm/norm.h"
#include "parallel.h"
#include "vec/tile.h"

namespace klfast {
namespace {

inline void run(const RmsNormArgs& a) {
    constexpr int W = Vec::width;
    const int n = static_cast<int>(a.channels), size = static_cast<int>(a.group_size), padded = round_up(size), groups = n / (size ? size : 1);
    const int threads = worthwhile_threads(a.n_threads, 5 * a.rows * a.rows_inner * n);
    parallel_for(a.rows * a.rows_inner, 16, threads, [&](std::int64_t begin, std::int64_t end) {
        const Scratch scratch(static_cast<std::size_t>(groups + 2) * padded);
        float* const weight = scratch.data;              // [groups, padded]
        float* const v = weight + groups * padded;       // [padded]
        float* const gate = v + padded;                  // [padded]
        for (int g = 0; g < groups; ++g) {
            if (a.weight) load_tile(weight + g * padded, padded, a.weight, g * size * a.weight.stride[0], a.weight.stride[0], 0, size, 1);
            else for (int i = 0; i < padded; ++i) weight[g * padded + i] = 1.0f;
        }
        for (std::int64_t row = begin; row < end; ++row) {
            for (int g = 0; g < groups; ++g) {
                const auto at = [&](const View& t) { return row / a.rows_inner * t.stride[0] + row % a.rows_inner * t.stride[1] + g * size * t.stride[2]; };
                load_tile(v, padded, a.x, at(a.x), a.x.stride[2], 0, size, 1);
                if (a.gate) load_tile(gate, padded, a.gate, at(a.gate), a.gate.stride[2], 0, size, 1);
                Vec squares = set(0.0f);
                for (int i = 0; i < padded; i += W) {
                    Vec x = load(v + i);
                    if (a.gate) x = x * silu(load(gate + i)), store(v + i, x);
                    squares = fma(x, x, squares);
                }
                const Vec scale = set(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + a.eps));
                for (int i = 0; i < padded; i += W) store(v + i, load(v + i) * scale * load(weight + g * padded + i));
                store_tile(v, padded, a.out, at(a.out), a.out.stride[2], 0, size, 1);
            }
        }
    });
}

}  // namespace
}  // namespace klfast
