// x W^T for many rows of bf16 x by vdpbf16ps: each 32-bit lane of an accumulator gains the products of a pair of
// neighbouring values, summed in float32. Up to four panels of W at a time are laid out whole, pairs side by side, in a
// buffer that stays in L2 and meets all rows of x in tiles of 6 x 4 accumulators: per pair of k, 4 loads and 6
// broadcasts for 24 products. Included by the tiers with AVX-512-BF16 only.
//
// `Source` says what W is stored as. source.depth is how many values of a row share a scale: an even number, or all of
// them. Source::Panels(source), one a thread, has
//     load(n0, vectors, pairs, scale)  writes rows n0 .. n0 + vectors kLanes as
//                                      pairs[(k / 2 * vectors + v) * kLanes + lane], where what follows an odd last
//                                      value is finite and meets a zero of x, and scales as
//                                      scale[(group * vectors + v) * kLanes + lane].
#pragma once

#include <cstring>

#include "gemm/partition.h"

namespace klfast {
namespace {

constexpr int kBf16Rows = 6, kBf16Vectors = 4;

// total[R, V kLanes] += scale * sum of `pairs` pairs of x with those of the panels
template <int R, int V>
void add_pairs(const std::uint16_t* x, std::int64_t x_stride, const std::int32_t* weights, std::int64_t pairs,
               const float* scale, float* total) {
    __m512 sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
    for (std::int64_t k = 0; k < pairs; ++k) {
        __m512bh w[V];
        for (int v = 0; v < V; ++v)
            w[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(weights + (k * V + v) * kLanes));
        for (int r = 0; r < R; ++r) {
            std::int32_t pair;
            std::memcpy(&pair, x + r * x_stride + 2 * k, sizeof pair);
            const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
            for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, w[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            store(total + (r * V + v) * kLanes,
                  fma(Vec{sum[r][v]}, load(scale + v * kLanes), load(total + (r * V + v) * kLanes)));
}

// y[m .. m + R, n0 .. n0 + V kLanes]
template <int R, int V>
void bf16_tile(const Product& a, const std::uint16_t* x, std::int64_t x_stride, std::int64_t depth, std::int64_t m,
               std::int64_t n0, const std::int32_t* weights, const float* scale) {
    alignas(64) float total[R * V * kLanes];
    for (int i = 0; i < R * V; ++i) store(total + i * kLanes, set(0.0f));
    for (std::int64_t k = 0; k < a.k; k += depth)
        add_pairs<R, V>(x + m * x_stride + k, x_stride, weights + k / 2 * V * kLanes, (smaller(depth, a.k - k) + 1) / 2,
                        scale + k / depth * V * kLanes, total);
    store_panels(a, m, n0, R, V, total, V * kLanes);
}

template <int V, int R = kBf16Rows, class... Rest>
void bf16_rows(std::int64_t rows, Rest... rest) {
    if constexpr (R > 1)
        if (rows < R) return bf16_rows<V, R - 1>(rows, rest...);
    bf16_tile<R, V>(rest...);
}

template <int V = kBf16Vectors, class... Rest>
void bf16_vectors(std::int64_t vectors, Rest... rest) {
    if constexpr (V > 1)
        if (vectors < V) return bf16_vectors<V - 1>(vectors, rest...);
    bf16_rows<V>(rest...);
}

// x with an even number of values a row, so that a pair never reaches into the next: a copy where k is odd.
struct EvenRows {
    std::int64_t stride;
    Buffer<std::uint16_t> copy;
    const std::uint16_t* data;

    explicit EvenRows(const Product& a)
        : stride(a.k % 2 ? a.k + 1 : a.x_stride),
          copy(a.k % 2 ? a.m * stride : 0),
          data(static_cast<const std::uint16_t*>(a.x)) {
        if (a.k % 2 == 0) return;
        for (std::int64_t m = 0; m < a.m; ++m) {
            std::memcpy(copy.data + m * stride, data + m * a.x_stride, a.k * sizeof *data);
            copy[m * stride + a.k] = 0;
        }
        data = copy.data;
    }
};

template <class Source>
void product_bf16(const Product& a, const Source& source) {
    const int threads = useful_threads(a, 0.25 * a.m * a.n * a.k);
    const EvenRows x(a);
    const std::int64_t depth = larger(1, smaller(source.depth, a.k)), groups = larger(1, (a.k + depth - 1) / depth);
    const std::int64_t tiles = (a.m + kBf16Rows - 1) / kBf16Rows;
    const Division division(a, kBf16Vectors, tiles, threads);
    parallel_for(division.count(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        typename Source::Panels source_panels(source);
        Buffer<std::int32_t> weights((a.k + 1) / 2 * kBf16Vectors * kLanes);
        Buffer<float> scale(groups * kBf16Vectors * kLanes);
        for (std::int64_t i = begin; i < end; ++i) {
            const Division::Item item = division[i];
            source_panels.load(item.v0 * kLanes, item.width, weights.data, scale.data);
            for (std::int64_t tile = item.first; tile < item.last; ++tile) {
                const std::int64_t m = a.m * tile / tiles, rows = a.m * (tile + 1) / tiles - m;
                bf16_vectors(item.width, rows, a, x.data, x.stride, depth, m, item.v0 * kLanes,
                             static_cast<const std::int32_t*>(weights.data), static_cast<const float*>(scale.data));
            }
        }
    });
}

}  // namespace
}  // namespace klfast
