// Rows of x as int8, for activation "int8": x ~ s q, with s = max|x| / 127 and q = round(x / s), half to even, per row
// and group of W. Included by the tiers only.
//
// q is stored by words of W. For int6 and int8 in natural order; for int4 the eight values that meet one word become
// 0 2 4 6 | 1 3 5 7, as the lower and the upper nibbles of the word's bytes lie.
#pragma once

#include <cstring>

#include "matmul/quantized/weight_panel.h"
#include "core/parallel.h"

namespace klfast {
namespace {

// The quads of bytes in each lane's word, in the order in which q has them.
template <int Bits>
[[gnu::always_inline]] inline void split(Ints word, Ints* quad) {
    if constexpr (Bits != 4) {
        quad[0] = word;
    } else {
        const Nibbles nibbles(word);
        quad[0] = nibbles.even;
        quad[1] = nibbles.odd;
    }
}

template <int Bits>
struct QuantizedX {
    static constexpr int count = kWordValues<Bits>,
                         quads = count / 4;  // values and quads of q (int32) for each word of W

    const DequantMatmulArgs& a;
    const Segments& segments;
    std::int64_t pitch;   // int32 of q in a row
    Buffer<float> scale;  // [groups, m]
    Buffer<float> sum;    // [segments, m]: sums of q

    QuantizedX(const DequantMatmulArgs& args, const Segments& all)
        : a(args), segments(all), pitch(a.words() * quads), scale(a.m * a.groups()), sum(a.m * segments.count) {}

    // Scratch of a thread.
    struct Row {
        Buffer<float> values;
        Buffer<std::int8_t> rounded;
        explicit Row(const QuantizedX& x) : values(round_up(x.a.k, kLanes)), rounded(x.a.words() * count) {}
    };

    // Takes all rows; writes q as [m, pitch].
    void fill(std::int32_t* q) const {
        prepare_for(a.m, 1, useful_threads(a, 8.0 * a.m * a.k), [&](std::int64_t begin, std::int64_t end) {
            const Row row(*this);
            for (std::int64_t m = begin; m < end; ++m) fill(m, row, q + m * pitch);
        });
    }

    // Takes row m; writes its q, zeros behind k.
    void fill(std::int64_t m, const Row& scratch, std::int32_t* q) const {
        float* const row = scratch.values.data;
        std::int8_t* const rounded = scratch.rounded.data;
        const float* const known = a.known_x ? a.known_x + m % a.bias_rows * a.k : nullptr;
        for (std::int64_t k = 0; k < a.k; k += kLanes) {
            const int valid = static_cast<int>(smaller(kLanes, a.k - k));
            const Vec x = load(a.x, m * a.x_stride + k, a.x_type, valid);
            store(row + k, known ? x - load(known, k, DType::f32, valid) : x);
        }
        for (std::int64_t g = 0; g < a.groups(); ++g) {
            const std::int64_t begin = g * a.group, end = smaller(begin + a.group, a.k);
            scale[g * a.m + m] = round_group(row, begin, end, rounded);
        }
        for (std::int64_t s = 0; s < segments.count; ++s) {
            std::int32_t total = 0;
            for (std::int64_t k = segments.list[s].begin; k < segments.list[s].end; ++k) total += rounded[k];
            sum[s * a.m + m] = static_cast<float>(total);
        }
        for (std::int64_t k = a.k; k < a.words() * count; ++k) rounded[k] = 0;
        arrange(rounded, a.words(), q);
    }

  private:
    // Rounds one group and returns its scale; NaN where x holds a NaN or infinity.
    static float round_group(const float* x, std::int64_t begin, std::int64_t end, std::int8_t* rounded) {
        std::int32_t largest = 0;  // magnitudes compare as their bits do, and a NaN above infinity
        for (std::int64_t k = begin; k < end; ++k) {
            const std::int32_t magnitude = __builtin_bit_cast(std::int32_t, x[k]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float s = __builtin_bit_cast(float, largest) / 127.0f;
        const bool finite = largest < 0x7f800000;
        const float inverse = finite && s >= 0x1p-126f ? 1.0f / s : 0.0f;  // below the normal numbers, 1 / s overflows
        for (std::int64_t k = begin; k < end; ++k) {
            const float magic = 0x1.8p23f;  // its last place is 1: the sum is rounded to an integer, half to even
            const float v = finite ? (x[k] * inverse + magic) - magic : 0.0f;
            rounded[k] = static_cast<std::int8_t>(static_cast<std::int32_t>(v));
        }
        return finite ? s : __builtin_nanf("");
    }

    static void arrange(const std::int8_t* rounded, std::int64_t words, std::int32_t* out) {
        if constexpr (Bits != 4) {
            std::memcpy(out, rounded, words * 4);
        } else {
            for (std::int64_t w = 0; w < words; ++w) {
                std::uint64_t v;
                std::memcpy(&v, rounded + 8 * w, 8);
                const auto gather = [](std::uint64_t even) {  // bytes 0 2 4 6 to the lower four
                    even &= 0x00ff00ff00ff00ff;
                    even = (even | even >> 8) & 0x0000ffff0000ffff;
                    return static_cast<std::int32_t>(even | even >> 16);
                };
                out[2 * w] = gather(v);
                out[2 * w + 1] = gather(v >> 8);
            }
        }
    }
};

}  // namespace
}  // namespace klfast
