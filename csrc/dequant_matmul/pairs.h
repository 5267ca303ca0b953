// Quantized weights as a source of products in bf16 with many rows of x. q - z lies between -255 and 255, which bf16 holds
// exactly, and so the sum of a group is multiplied by its scale afterwards: nothing is rounded but float32 sums. A pair of
// values must not belong to two groups. Included by the tiers with AVX-512-BF16 only.
#pragma once

#include "dequant_matmul/exact_large.h"

namespace klfast {
namespace {

template <int Bits>
struct QuantizedPairs {
    const DequantMatmulArgs& args;
    const Segments& segments;
    std::int64_t depth = args.group;
    Digits<Bits> digits{};

    struct Panels {
        const QuantizedPairs& source;
        Grid grid{source.args};
        alignas(64) std::int32_t words[(kBlock * Bits / 32 + W) * W];
        alignas(64) float values[kBlock * W];

        explicit Panels(const QuantizedPairs& pairs) : source(pairs) {}

        void load(std::int64_t n0, std::int64_t vectors, std::int32_t* pairs, float* scale) {
            constexpr int count = 32 / Bits;
            const DequantMatmulArgs& a = source.args;
            for (std::int64_t v = 0; v < vectors; ++v) {
                grid.load_panel(a, n0 + v * W);
                for (std::int64_t g = 0; g < a.groups(); ++g) store(scale + (g * vectors + v) * W, klfast::load(grid.scale.data + g * W));
                for (std::int64_t block = 0; block < a.k; block += kBlock) {
                    const std::int64_t depth = smaller(kBlock, a.k - block);
                    load_words(a, n0 + v * W, block / count, (depth + count - 1) / count, words);
                    source.segments.within(block, block + depth, [&](const Segment& seg) {
                        dequantize(source.digits, words, seg.begin - block, seg.end - block, klfast::load(grid.zero.data + seg.group * W), set(1.0f), values, W);
                    });
                    if (depth % 2) store(values + depth * W, set(0.0f));
                    for (std::int64_t k = 0; k < depth; k += 2) write(pairs + ((block + k) / 2 * vectors + v) * W, pair(values + k * W));
                }
            }
        }

        // Two vectors of floats that bf16 holds exactly, as pairs.
        static Ints pair(const float* from) {
            const __m512i low = bits_of(klfast::load(from)).v, high = bits_of(klfast::load(from + W)).v;
            return {_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high)};
        }
    };
};

}  // namespace
}  // namespace klfast
