// activation "exact" with one row of x and int4 weights, by integer dot products: exact_few_rows.h's lines in the tiers
// that have dot_planes. Included by these only.
//
// The values of x that meet a line become integers of 22 bits and a sign in one unit, a power of two, and these three
// bytes each, the planes: x = unit (2^15 a + 2^7 b + c), with -127 <= a <= 127, -128 <= b < 128, -64 <= c < 64. An x
// is rounded by at most 2^-22 of the line's largest, which is at most 32 times the mean magnitude: so a sum has at most
// the error of 2^-17 of that mean times the weights' magnitudes, and mostly a hundredth of it, which is what float32
// sums have. Other lines are multiplied as floats: with outliers, infinities or NaNs in x, or with tiny x.
#pragma once

#include <cstring>

#include "matmul/quantized/exact_few_rows.h"

namespace klfast {
namespace {

template <int Bits>
struct PlaneLines {
    static_assert(Bits == 4);
    static constexpr int count = kWordValues<Bits> * kLanes;  // values in a line
    static constexpr int planes = 3, steps = kWordValues<Bits>;
    static constexpr bool kUnits = true;
    FloatLines<Bits> floats;

    // The quads of kTopPlane a, b and c that meet a word's even and odd values in turn, then -8 times the sum of each
    // word's integers.
    float arrange(const float* x, std::int32_t* out) const {
        const float unit = unit_of(x);
        if (unit == 1.0f) return floats.arrange(x, out);
        const float inverse = 1.0f / unit;
        std::int32_t integer[2][count / 2];  // of even and of odd values
        for (int i = 0; i < count / 2; ++i)
            for (int odd = 0; odd < 2; ++odd) {
                const float magic = 0x1.8p23f;  // its last place is 1: the sum is rounded to an integer
                integer[odd][i] = static_cast<std::int32_t>((x[2 * i + odd] * inverse + magic) - magic);
            }
        for (int odd = 0; odd < 2; ++odd) {
            std::int8_t byte[planes][count / 2];
            for (int i = 0; i < count / 2; ++i) {
                const std::int32_t q = integer[odd][i], c = ((q + 64) & 127) - 64, rest = (q - c) >> 7,
                                   b = ((rest + 128) & 255) - 128;
                byte[0][i] = static_cast<std::int8_t>(kTopPlane * ((rest - b) >> 8));
                byte[1][i] = static_cast<std::int8_t>(b);
                byte[2][i] = static_cast<std::int8_t>(c);
            }
            for (int p = 0; p < planes; ++p) std::memcpy(out + (2 * p + odd) * kLanes, byte[p], count / 2);
        }
        std::int32_t* const sums = out + 2 * planes * kLanes;
        write(sums, set_int(0));
        write(sums, dot_planes(Nibbles(set_int(static_cast<std::int32_t>(0x88888888))), out));
        for (int word = 0; word < kLanes; ++word) sums[word] = -sums[word];
        return unit;
    }

    template <int R, int M>
    [[gnu::always_inline]] void add(const Ints (&words)[R], const std::int32_t* x, std::int64_t x_pitch, float unit,
                                    Vec (&acc)[M][R]) const {
        static_assert(M == 1);
        if (unit == 1.0f) return floats.add(words, x, x_pitch, unit, acc);
        unrolled<R>([&](int r) KLFAST_INLINE { acc[0][r] = to_float(dot_planes(Nibbles(words[r]), x)); });
    }

  private:
    // The unit of a line's values; 1 if they are to be multiplied as floats.
    static float unit_of(const float* x) {
        float of_lane[kLanes];
        Vec most = set(0.0f), all = set(0.0f);
        for (int i = 0; i < count; i += kLanes) {
            const Vec minus = negative_abs(load(x + i));
            most = min(minus, most), all = all - minus;
        }
        store(of_lane, most);
        float largest = 0.0f;
        for (const float minus : of_lane) largest = -minus > largest ? -minus : largest;
        if (!(count * largest <= 32.0f * sum(all) && 0x1p-40f <= largest && largest < 0x1p100f)) return 1.0f;
        const float below = __builtin_bit_cast(float, __builtin_bit_cast(std::int32_t, largest) & 0x7f800000);
        const float unit = below * 0x1p-21f;
        return largest > 4177855.0f * unit ? 2.0f * unit : unit;  // beyond 127 2^15 + 127 2^7 + 63
    }
};

}  // namespace
}  // namespace klfast
