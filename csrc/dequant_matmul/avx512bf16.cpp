// dequant_matmul at tier avx512bf16: "exact" with many rows of bf16 x by vdpbf16ps; whatever else as tier avx512vnni does.
//
// q - z lies between -255 and 255, which bf16 holds exactly, and so the sum of a group is multiplied by its scale
// afterwards: nothing is rounded but float32 sums. A pair of values must not belong to two groups.
#include "dequant_matmul/dequant_matmul.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "dequant_matmul/exact_large.h"
#include "product/bf16.h"

namespace klfast {
namespace {

constexpr int kFewRows = 8;  // up to which a word is unpacked in registers, by tier avx512vnni

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

template <int Bits>
void run_bf16(const DequantMatmulArgs& a) {
    const Segments segments(a);
    product_bf16(a, QuantizedPairs<Bits>{a, segments});
}

}  // namespace

namespace avx512bf16 {

void dequant_matmul(const DequantMatmulArgs& a) {
    const bool pairs_within_groups = a.group % 2 == 0 || a.groups() <= 1;
    if (a.int8_activation || a.x_type != DType::bf16 || a.m <= kFewRows || a.n == 0 || !pairs_within_groups) return avx512vnni::dequant_matmul(a);
    if (a.bits == 4) run_bf16<4>(a);
    else run_bf16<8>(a);
}

}  // namespace avx512bf16
}  // namespace klfast
