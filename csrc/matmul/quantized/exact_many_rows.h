// Quantized weights as a source of products with many rows of x. Included by the tiers only.
#pragma once

#include "matmul/quantized/digits.h"
#include "gemm/fp32.h"

namespace klfast {
namespace {

// Values [begin, end) of one panel, dequantized, as out[k * pitch + lane] for k from 0 at the words' begin.
template <int Bits>
void dequantize(const Digits<Bits>& digits, const std::int32_t* words, std::int64_t begin, std::int64_t end, Vec z,
                Vec scale, float* out, int pitch) {
    using D = Digits<Bits>;
    Vec zero[D::placed], scales[D::placed];
    digits.zeros(z, zero);
    for (int p = 0; p < D::placed; ++p) scales[p] = scale * set(digits.power[p]);
    digits.for_values(words, begin, end, zero, [&](std::int64_t k, int p, Vec value) __attribute__((always_inline)) {
        store(out + k * pitch, value * scales[p]);
    });
}

template <int Bits>
struct QuantizedRows {
    const DequantMatmulArgs& args;
    const Segments& segments;
    Digits<Bits> digits;

    struct Panels {
        const QuantizedRows& source;
        PanelGrid grids[2]{PanelGrid(source.args), PanelGrid(source.args)};
        std::int64_t n0 = 0;
        alignas(64) std::int32_t words[(kBlock * Bits / 32 + kLanes) * kLanes];

        explicit Panels(const QuantizedRows& rows) : source(rows) {}

        void load(std::int64_t row) {
            n0 = row;
            for (int half = 0; half < 2; ++half) grids[half].load_panel(source.args, n0 + half * kLanes);
        }

        void fill(std::int64_t block, std::int64_t depth, float* out) {
            constexpr int count = 32 / Bits;
            for (int half = 0; half < 2; ++half) {
                load_words(source.args, n0 + half * kLanes, block / count, (depth + count - 1) / count, words);
                const PanelGrid& grid = grids[half];
                source.segments.within(block, block + depth, [&](const Segment& seg) {
                    dequantize(source.digits, words, seg.begin - block, seg.end - block,
                               klfast::load(grid.zero.data + seg.group * kLanes),
                               klfast::load(grid.scale.data + seg.group * kLanes), out + half * kLanes, kPair);
                });
            }
        }
    };
};

template <int Bits>
void run_exact_large(const DequantMatmulArgs& a, const Segments& segments) {
    product_fp32(a, QuantizedRows<Bits>{.args = a, .segments = segments, .digits = {}});
}

}  // namespace
}  // namespace klfast
