// A panel: as many rows of W as a vector has lanes, one row a lane. Words, scales and zero points of Layout.PLAIN lie
// row by row and are transposed here on the way in; all else works on panels and never sees the layout.
// Included by the tiers only; local to the including translation unit.
#pragma once

#include <cstdint>

#include "matmul/quantized/dequant_matmul.h"
#include "gemm/common.h"
#include "gemm/segments.h"

namespace klfast {
namespace {

// Words of `count` columns from `first` on, rows n0.., as out[column * kLanes + lane]; zeros for rows behind the last.
// `out` has room for count rounded up to a multiple of kLanes. Asks for the same words of the rows `ahead` further on.
inline void load_words(const DequantMatmulArgs& a, std::int64_t n0, std::int64_t first, std::int64_t count,
                       std::int32_t* out, std::int64_t ahead = kLanes) {
    const std::int64_t words = a.words(), valid = smaller(kLanes, a.n - n0);
    const std::int32_t* base = a.packed + n0 * words + first;
    for (std::int64_t c = 0; c < count; c += kLanes) {
        Ints rows[kLanes];
        if (valid == kLanes && count - c >= kLanes)
            for (int lane = 0; lane < kLanes; ++lane) {
                rows[lane] = read(base + lane * words + c);
                __builtin_prefetch(base + (lane + ahead) * words + c, 0, 2);
            }
        else
            for (int lane = 0; lane < kLanes; ++lane)
                rows[lane] = read(base + (lane < valid ? lane * words + c : 0), lane < valid ? count - c : 0);
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) write(out + (c + i) * kLanes, rows[i]);
    }
}

// Scales and zero points (as stored: q - q_min) of a panel as floats [group][lane].
struct PanelGrid {
    Buffer<float> scale, zero;

    explicit PanelGrid(const DequantMatmulArgs& a)
        : scale(round_up(a.groups(), kLanes) * kLanes), zero(round_up(a.groups(), kLanes) * kLanes) {
        const Vec middle = set(static_cast<float>(1 << (a.bits - 1)));
        if (a.zero_point == nullptr)
            for (std::int64_t g = 0; g < a.groups(); ++g) store(zero.data + g * kLanes, middle);
    }

    void load_panel(const DequantMatmulArgs& a, std::int64_t n0) {
        const std::int64_t groups = a.groups();
        const int per_word = 32 / a.bits;
        const Ints mask = set_int((1 << a.bits) - 1);
        for (std::int64_t g = 0; g < groups; g += kLanes) {
            const int count = static_cast<int>(smaller(kLanes, groups - g));
            Ints rows[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const std::int64_t n = smaller(n0 + lane, a.n - 1);
                rows[lane] = bits_of(load(a.scale, n * groups + g, a.scale_type, count));
            }
            transpose_to(rows, scale.data + g * kLanes);
            if (a.zero_point == nullptr) continue;
            for (int lane = 0; lane < kLanes; ++lane) {
                const std::int64_t n = smaller(n0 + lane, a.n - 1);
                const Ints word = read(a.zero_point + n / per_word * groups + g, count);
                rows[lane] = bits_of(to_float(shift_right(word, static_cast<int>(n % per_word) * a.bits) & mask));
            }
            transpose_to(rows, zero.data + g * kLanes);
        }
    }

  private:
    static void transpose_to(Ints (&rows)[kLanes], float* out) {
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) write(reinterpret_cast<std::int32_t*>(out + i * kLanes), rows[i]);
    }
};

}  // namespace
}  // namespace klfast
