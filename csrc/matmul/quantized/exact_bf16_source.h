// Quantized weights as a source of products in bf16 with many rows of x. q - z lies between -255 and 255, which bf16
// holds exactly, and so the sum of a group is multiplied by its scale afterwards: nothing is rounded but float32 sums.
// A pair of values must not belong to two groups. Included by the tiers with AVX-512-BF16 only.
#pragma once

#include "matmul/quantized/weight_panel.h"

namespace klfast {
namespace {

// The pairs of bf16 q - z that lie in each lane's word, for zero points z.
template <int Bits>
struct WordPairs;

// vpermw looks up a number of five bits, in two's complement.
template <>
struct WordPairs<4> {
    static constexpr int count = 4;

    struct Table {
        alignas(64) std::uint16_t bf16[2 * kLanes];
        Table() {
            for (int i = 0; i < 2 * kLanes; ++i)
                bf16[i] = float_to_bf16(static_cast<float>(i < kLanes ? i : i - 2 * kLanes));
        }
    };

    __m512i table, zero;
    WordPairs(const Table& t, Vec z)
        : table(_mm512_load_si512(t.bf16)),
          zero(_mm512_mullo_epi32(_mm512_cvtps_epi32(z.v), _mm512_set1_epi32(0x10001))) {}

    // Digits 2 j and 2 j + 1, turned to the lowest bits of either half.
    [[gnu::always_inline]] Ints pair(Ints word, int j) const {
        const __m512i low = _mm512_rorv_epi32(word.v, _mm512_set1_epi32(8 * j)),
                      high = _mm512_rorv_epi32(word.v, _mm512_set1_epi32((8 * j + 20) % 32));
        const __m512i digits = _mm512_ternarylogic_epi32(_mm512_and_si512(low, _mm512_set1_epi32(0xf)), high,
                                                         _mm512_set1_epi32(0xf0000), 0xf8);  // a | (b & c)
        return {_mm512_permutexvar_epi16(_mm512_sub_epi16(digits, zero), table)};
    }
};

// With q in its lowest bits 2^23 is 2^23 + q; subtracting 2^23 + z is exact, and bf16 the upper half of what remains.
template <>
struct WordPairs<8> {
    static constexpr int count = 2;
    struct Table {};

    Vec zero;
    WordPairs(const Table&, Vec z) : zero(z + set(0x1p23f)) {}

    [[gnu::always_inline]] Ints pair(Ints word, int j) const {
        const __m512i low = value(word, 16 * j).v, high = value(word, 16 * j + 8).v;
        return {_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high)};
    }

  private:
    Ints value(Ints word, int shift) const {
        return bits_of(masked_float({_mm512_srli_epi32(word.v, shift)}, set_int(0xff), bits_of(set(0x1p23f))) - zero);
    }
};

template <int Bits>
struct QuantizedPairs {
    using Pairs = WordPairs<Bits>;
    const DequantMatmulArgs& args;
    const Segments& segments;
    std::int64_t depth = args.group;
    typename Pairs::Table table{};

    struct Panels {
        const QuantizedPairs& source;
        PanelGrid grid{source.args};
        alignas(64) std::int32_t words[(kBlock * Bits / 32 + kLanes) * kLanes];

        explicit Panels(const QuantizedPairs& pairs) : source(pairs) {}

        void load(std::int64_t n0, std::int64_t vectors, std::int32_t* pairs, float* scale) {
            constexpr int count = 32 / Bits;
            const DequantMatmulArgs& a = source.args;
            for (std::int64_t v = 0; v < vectors; ++v) {
                grid.load_panel(a, n0 + v * kLanes);
                for (std::int64_t g = 0; g < a.groups(); ++g)
                    store(scale + (g * vectors + v) * kLanes, klfast::load(grid.scale.data + g * kLanes));
                for (std::int64_t block = 0; block < a.k; block += kBlock) {
                    load_words(a, n0 + v * kLanes, block / count, smaller(kBlock / count, a.words() - block / count),
                               words);
                    source.segments.within(block, block + kBlock, [&](const Segment& seg) {
                        const Pairs of(source.table, klfast::load(grid.zero.data + seg.group * kLanes));
                        fill(of, (seg.begin - block) / 2, (seg.end - block + 1) / 2,
                             pairs + (block / 2 * vectors + v) * kLanes, vectors * kLanes);
                    });
                }
            }
        }

        // Pairs [begin, end) of a block, `pitch` apart.
        void fill(const Pairs& of, std::int64_t begin, std::int64_t end, std::int32_t* out, std::int64_t pitch) const {
            const auto one = [&](std::int64_t p, int j) __attribute__((always_inline)) {
                write(out + p * pitch, of.pair(read(words + p / Pairs::count * kLanes), j));
            };
            std::int64_t p = begin;
            for (; p < end && p % Pairs::count != 0; ++p) one(p, static_cast<int>(p % Pairs::count));
            for (; p + Pairs::count <= end; p += Pairs::count) {
                const Ints word = read(words + p / Pairs::count * kLanes);
                std::int32_t* const to = out + p * pitch;
                unrolled<Pairs::count>([&](int j) KLFAST_INLINE { write(to + j * pitch, of.pair(word, j)); });
            }
            for (; p < end; ++p) one(p, static_cast<int>(p % Pairs::count));
        }
    };
};

}  // namespace
}  // namespace klfast
