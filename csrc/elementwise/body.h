// Combinations over Vec: blocks of a row's columns are the work items.
#pragma once

#include "core/parallel.h"
#include "elementwise/combine.h"
#include "elementwise/gelu.h"
#include "simd/rounded.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

constexpr std::int64_t kColumns = 512;

template <class Function>
void combine_rows(const CombineArgs& c, Function&& function) {
    const std::int64_t blocks = (c.width + kColumns - 1) / kColumns;
    const int threads = worthwhile_threads(c.n_threads, 8.0 * c.rows * c.width);
    parallel_for(c.rows * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t row = item / blocks, first = item % blocks * kColumns,
                               last = smaller(first + kColumns, c.width);
            for (std::int64_t i = first; i < last; i += kLanes) {
                const int n = lanes(last - i);
                const auto of = [&](const View& v) { return load(v.data, row * v.stride[0] + i, v.dtype, n); };
                const Vec y = function(of(c.a), of(c.b));
                store(c.out.data, row * c.out.stride[0] + i, c.out.dtype, n, y);
                if (c.narrow) store(c.narrow.data, row * c.narrow.stride[0] + i, c.narrow.dtype, n, y);
            }
        }
    });
}

inline void run(const CombineArgs& c) {
    const auto step = [&](Vec v) { return rounded(v, c.out.dtype); };
    switch (c.how) {
        case Combination::add: {
            const Vec factor = set(c.factor);
            if (c.factor == 1.0f) return combine_rows(c, [](Vec a, Vec b) { return a + b; });
            return combine_rows(c, [&](Vec a, Vec b) { return a + step(factor * b); });
        }
        case Combination::average: return combine_rows(c, [&](Vec a, Vec b) { return step(a + b) * set(0.5f); });
        case Combination::multiply: return combine_rows(c, [](Vec a, Vec b) { return a * b; });
        case Combination::silu_gate: return combine_rows(c, [&](Vec a, Vec b) { return step(silu(a)) * b; });
        case Combination::sigmoid_gate: return combine_rows(c, [&](Vec a, Vec b) { return step(sigmoid(a)) * b; });
        case Combination::gelu_gate: return combine_rows(c, [&](Vec a, Vec b) { return step(gelu(a)) * b; });
        case Combination::gelu_tanh_gate: return combine_rows(c, [&](Vec a, Vec b) { return step(gelu_tanh(a)) * b; });
        case Combination::relu_gate: return combine_rows(c, [](Vec a, Vec b) { return max(a, set(0.0f)) * b; });
        case Combination::softplus_gate: return combine_rows(c, [&](Vec a, Vec b) { return step(softplus(a)) * b; });
    }
}

}  // namespace
}  // namespace klfast
