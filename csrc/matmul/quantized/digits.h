// activation "exact": float32 sums of x (q - z), scale by scale. Included by the tiers only.
//
// How an integer becomes a float without a conversion: with q the stored value, p its place in the lower part of a
// word, or in the upper one shifted down and B = 2^bits, the bits (word & mask_p) | bits(2^23) are the float 2^23 + q
// B^p. Subtracting 2^23 + z B^p leaves (q - z) B^p without rounding, and the factor B^-p, a power of two, goes into x
// or into the scale. Of int6, three of the four values of a unit have such places, and the fourth has the first one
// after a shift by 18.
#pragma once

#include "matmul/quantized/weight_panel.h"
#include "core/parallel.h"

namespace klfast {
namespace {

template <int Bits>
struct Digits {
    static constexpr int count = kWordValues<Bits>;           // of a word
    static constexpr int placed = Bits == 6 ? 3 : 16 / Bits;  // of the lower part of a word
    static constexpr int upper = placed * Bits;               // where the upper part begins

    Ints mask[placed];
    float power[placed + kLanes];  // power[i] = B^-(i mod placed), so that kLanes from any place on can be loaded

    Digits() {
        for (int p = 0; p < placed; ++p) mask[p] = set_int(((1 << Bits) - 1) << (Bits * p));
        for (int i = 0; i < placed + kLanes; ++i) power[i] = 1.0f / static_cast<float>(1 << (Bits * (i % placed)));
    }

    // What is subtracted from a digit in each place, for zero point z.
    void zeros(Vec z, Vec (&zero)[placed]) const {
        for (int p = 0; p < placed; ++p) zero[p] = z * set(static_cast<float>(1 << (Bits * p))) + set(0x1p23f);
    }

    // (q - z) B^p of the digit at place p of the lower part of each word.
    Vec value(Ints word, int p, const Vec (&zero)[placed]) const {
        return masked_float(word, mask[p], bits_of(set(0x1p23f))) - zero[p];
    }

    // Calls each(k, p, (q - z) B^p) for the values k in [begin, end) of a panel's words.
    template <class Each>
    void for_values(const std::int32_t* words, std::int64_t begin, std::int64_t end, const Vec (&zero)[placed],
                    Each&& each) const {
        std::int64_t k = begin;
        for (; k < end && k % count != 0; ++k) one(words, k, zero, each);
        for (; k + count <= end; k += count) {
            const Ints low = read(words + k / count * kLanes), high = shift_right(low, upper);
            for (int j = 0; j < count; ++j) each(k + j, j % placed, value(j < placed ? low : high, j % placed, zero));
        }
        for (; k < end; ++k) one(words, k, zero, each);
    }

  private:
    template <class Each>
    void one(const std::int32_t* words, std::int64_t k, const Vec (&zero)[placed], Each&& each) const {
        const int j = static_cast<int>(k % count);
        const Ints word = read(words + k / count * kLanes);
        each(k, j % placed, value(j < placed ? word : shift_right(word, upper), j % placed, zero));
    }
};

}  // namespace
}  // namespace klfast
