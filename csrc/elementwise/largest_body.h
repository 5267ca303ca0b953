// Largest values over Vec: rows are the work items. Where in a row its maximum lies is looked up only in the block that
// has it.
#pragma once

#include <cmath>
#include <limits>

#include "core/parallel.h"
#include "elementwise/largest.h"
#include "simd/tile_io.h"
#include "simd/unrolled.h"

namespace klfast {
namespace {

constexpr std::int64_t kLargestBlock = 1024;

// The maximum of x[begin, end), or a NaN if there is one.
inline float largest_within(const float* x, std::int64_t begin, std::int64_t end) {
    constexpr int kChains = 4;
    Vec most[kChains], check[kChains];  // check: 0, or not if there is a NaN or an infinity
    unrolled<kChains>([&](int c) KLFAST_INLINE {
        most[c] = set(-std::numeric_limits<float>::infinity());
        check[c] = set(0.0f);
    });
    std::int64_t i = begin;
    for (; i + kChains * kLanes <= end; i += kChains * kLanes)
        unrolled<kChains>([&](int c) KLFAST_INLINE {
            const Vec v = load(x + i + c * kLanes);
            most[c] = max(v, most[c]);
            check[c] = fma(v, set(0.0f), check[c]);
        });
    float lane[kLanes], found = -std::numeric_limits<float>::infinity();
    bool is_finite = true;
    for (int c = 0; c < kChains; ++c) {
        store(lane, most[c]);
        for (const float v : lane) found = v > found ? v : found;
        is_finite = is_finite && sum(check[c]) == 0.0f;
    }
    if (!is_finite) i = begin;
    for (; i < end; ++i) {
        if (std::isnan(x[i])) return x[i];
        found = x[i] > found ? x[i] : found;
    }
    return found;
}

inline void largest_of(const float* x, std::int64_t width, float& value, std::int64_t& index) {
    std::int64_t block = 0;
    for (std::int64_t begin = 0; begin < width; begin += kLargestBlock) {
        const float found = largest_within(x, begin, smaller(begin + kLargestBlock, width));
        if (begin == 0 || found > value || std::isnan(found)) value = found, block = begin;
        if (std::isnan(found)) break;
    }
    for (index = block; x[index] != value && !std::isnan(x[index]);) ++index;
}

inline void run(const LargestArgs& a) {
    parallel_for(a.rows, 1, worthwhile_threads(a.n_threads, 1.0 * a.rows * a.width),
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t row = begin; row < end; ++row)
                         largest_of(a.x + row * a.stride, a.width, a.value[row], a.index[row]);
                 });
}

}  // namespace
}  // namespace klfast
