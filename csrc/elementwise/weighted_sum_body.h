// Weighted sums over Vec: blocks of a row's columns are the work items.
#pragma once

#include "elementwise/body.h"
#include "elementwise/weighted_sum.h"

namespace klfast {
namespace {

inline void run(const WeightedSumArgs& a) {
    const std::int64_t blocks = (a.width + kColumns - 1) / kColumns;
    const DType product = a.weights.dtype == DType::f32 ? DType::f32 : a.out.dtype;
    const int threads = worthwhile_threads(a.n_threads, 4.0 * a.rows * a.each * a.width);
    parallel_for(a.rows * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t row = item / blocks, first = item % blocks * kColumns,
                               last = smaller(first + kColumns, a.width);
            const std::int64_t* const place = a.place + row * a.each;
            for (std::int64_t i = first; i < last; i += kLanes) {
                const int n = lanes(last - i);
                Vec total = set(0.0f);
                for (std::int64_t s = 0; s < a.each; ++s) {
                    const Vec weight = set(load_float(a.weights.data, row * a.weights.stride[0] + s, a.weights.dtype));
                    const Vec x = load(a.x.data, place[s] * a.x.stride[0] + i, a.x.dtype, n);
                    total = total + rounded(weight * x, product);
                }
                store(a.out.data, row * a.out.stride[0] + i, a.out.dtype, n, total);
            }
        }
    });
}

}  // namespace
}  // namespace klfast
