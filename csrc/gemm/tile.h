// Products of float32 register tiles: up to kTileRows rows of x with two vectors of columns.
#pragma once

#include "gemm/common.h"

namespace klfast {
namespace {

constexpr int kPair = 2 * kLanes;  // columns computed together

// sums[R, kPair] += x[R, depth] weights[depth, kPair]; rows of x are kBlock apart.
template <int R>
void tile_product(const float* x, const float* weights, std::int64_t depth, float* sums) {
    Vec left[R], right[R];
    for (int r = 0; r < R; ++r) left[r] = right[r] = set(0.0f);
    for (std::int64_t k = 0; k < depth; ++k) {
        const Vec w0 = load(weights + k * kPair), w1 = load(weights + k * kPair + kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec v = set(x[r * kBlock + k]);
            left[r] = fma(v, w0, left[r]);
            right[r] = fma(v, w1, right[r]);
        }
    }
    for (int r = 0; r < R; ++r) {  // added last: a part's terms do not vanish beside a long sum
        float* const at = sums + r * kPair;
        store(at, load(at) + left[r]);
        store(at + kLanes, load(at + kLanes) + right[r]);
    }
}

template <int R = kTileRows>
void tile_product(std::int64_t rows, const float* x, const float* weights, std::int64_t depth, float* sums) {
    if constexpr (R > 1)
        if (rows < R) return tile_product<R - 1>(rows, x, weights, depth, sums);
    tile_product<R>(x, weights, depth, sums);
}

}  // namespace
}  // namespace klfast
