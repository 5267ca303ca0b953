// What every product of x with panels of W needs: kLanes rows of the weight W make a panel, one row a lane.
// Included by the tiers after their vectors; local to the including translation unit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/buffer.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "gemm/args.h"
#include "simd/rounded.h"
#include "simd/unrolled.h"

namespace klfast {
namespace {

// Values of a row handled at a time. Sums of 256 products of stored values (at most 255) and int8 stay below 2^24, so
// that they are exact as floats too.
constexpr int kBlock = 256;

// Prefetch distance in bytes of W, into L2: the hardware's own prefetch stops at each page, and into L1 too few can be
// under way at once (docs/KERNEL_NOTES.md).
constexpr int kAhead = 8192;

// Writes total + bias, whose row begins at `bias`, to y[m, n0 .. n0 + valid].
inline void store_columns(const Product& a, std::int64_t m, std::int64_t n0, int valid, Vec total, std::int64_t bias) {
    if (a.bias != nullptr) total = total + load(a.bias, bias + n0, a.bias_type, valid);
    if (a.y_type != a.rounded_to) total = rounded(total, a.rounded_to);
    store(a.y, m * a.n + n0, a.y_type, valid, total);
}

inline void store_columns(const Product& a, std::int64_t m, std::int64_t n0, int valid, Vec total) {
    store_columns(a, m, n0, valid, total, a.bias_from(m));
}

// The same for a whole panel: y[m, n0 ..].
inline void store_panel(const Product& a, std::int64_t m, std::int64_t n0, Vec total, std::int64_t bias) {
    store_columns(a, m, n0, static_cast<int>(smaller(kLanes, a.n - n0)), total, bias);
}

// Several panels, row r of them at total + r * pitch: y[m .. m + rows, n0 .. n0 + vectors kLanes]. Hoists the checks
// that are the same for every vector out of the loop.
inline void store_panels(const Product& a, std::int64_t m, std::int64_t n0, std::int64_t rows, std::int64_t vectors,
                         const float* total, std::int64_t pitch) {
    const bool plain =
        a.y_type == DType::bf16 && a.rounded_to == DType::bf16 && a.bias == nullptr && n0 + vectors * kLanes <= a.n;
    for (std::int64_t r = 0; r < rows; ++r, total += pitch) {
        const std::int64_t bias = a.bias_from(m + r);
        for (std::int64_t v = 0; v < vectors; ++v) {
            const Vec y = load(total + v * kLanes);
            if (plain)
                store(a.y, (m + r) * a.n + n0 + v * kLanes, DType::bf16, kLanes, y);
            else
                store_panel(a, m + r, n0 + v * kLanes, y, bias);
        }
    }
}

// Threads for `macs` multiplications.
inline int useful_threads(const Product& a, double macs) { return worthwhile_threads(a.n_threads, macs, 65536); }

}  // namespace
}  // namespace klfast
