// activation "int8" with many rows of x by tiles: int8_many_rows.h's algebra, its integers taken by tdpbssd. For int4
// q_w - z lies between -15 and 15, so that z is taken off on the way into a tile and nothing is left to correct; for
// int8 128 is, and what is left of z only where there is any: with zero points, and for int6, which is taken as int8.
// Included by the tier amx only.
#pragma once

#include "matmul/quantized/int8_activations.h"
#include "gemm/amx.h"

namespace klfast {
namespace {

template <int Bits>
struct Int8Factors {
    static constexpr int values = 4;
    const DequantMatmulArgs& a;
    const Segments& segments;
    const QuantizedX<Bits>& x;

    template <int C, int A, int B>
    [[gnu::always_inline]] static void dot() {
        tile_dot_int8<C, A, B>();
    }

    struct Terms {
        Vec scale[kBlockVectors], zero[kBlockVectors];
        const float *x_scale, *x_sum;  // x_sum is nullptr where nothing is to correct

        [[gnu::always_inline]] void add(const std::int32_t* sums, float* total, std::int64_t row) const {
            const Vec s = set(x_scale[row]);
            for (int v = 0; v < kBlockVectors; ++v) {
                Vec exact = to_float(read(sums + v * kLanes));  // integers below 2^24
                if (Bits == 8 && x_sum != nullptr) exact = exact - zero[v] * set(x_sum[row]);
                store(total + v * kLanes, load(total + v * kLanes) + exact * (scale[v] * s));
            }
        }
    };

    struct Panel {
        const Int8Factors& factors;
        std::int64_t pitch;
        PanelGrid grids[kPanelVectors]{PanelGrid(factors.a), PanelGrid(factors.a), PanelGrid(factors.a),
                                       PanelGrid(factors.a)};

        Panel(const Int8Factors& f, std::int64_t tiles_pitch) : factors(f), pitch(tiles_pitch) {}

        void load(std::int64_t n0, std::int64_t vectors, std::int32_t* w) {
            for (std::int64_t v = 0; v < vectors; ++v) {
                grids[v].load_panel(factors.a, n0 + v * kLanes);
                fill(grids[v], n0 + v * kLanes, w + v * pitch);
            }
            if (vectors % 2)  // the last block is a vector short
                for (std::int64_t g = 0; g < factors.a.groups(); ++g)
                    store(grids[vectors].scale.data + g * kLanes, set(0.0f));
        }

        Terms terms(const Segment& segment, std::int64_t s, std::int64_t m, std::int64_t v) const {
            const DequantMatmulArgs& a = factors.a;
            Terms terms{
                .scale = {},
                .zero = {},
                .x_scale = factors.x.scale.data + segment.group * a.m + m,
                .x_sum = a.zero_point || a.bits == 6 ? factors.x.sum.data + s * a.m + m : nullptr,
            };
            for (int i = 0; i < kBlockVectors; ++i) {
                const PanelGrid& grid = grids[v + i];
                terms.scale[i] = klfast::load(grid.scale.data + segment.group * kLanes);
                terms.zero[i] = klfast::load(grid.zero.data + segment.group * kLanes) - set(128.0f);
            }
            return terms;
        }

      private:
        // Tiles of kLanes rows, k in the order in which x has it. Behind the last value, where x is zero, anything may
        // be.
        void fill(const PanelGrid& grid, std::int64_t n0, std::int32_t* w) const {
            const DequantMatmulArgs& a = factors.a;
            for (std::int64_t i = a.words() * QuantizedX<Bits>::quads * kLanes; i < pitch; i += kLanes)
                write(w + i, set_int(0));
            constexpr int count = kWordValues<Bits>;
            alignas(64) std::int32_t words[(kBlock / count + kLanes) * kLanes];
            for (std::int64_t block = 0; block < a.k; block += kBlock) {
                const std::int64_t block_words = smaller(kBlock / count, a.words() - block / count);
                load_words(a, n0, block / count, block_words, words);
                factors.segments.within(block, block + kBlock, [&](const Segment& segment) {
                    const __m512i zero = bytes(klfast::load(grid.zero.data + segment.group * kLanes));
                    for (std::int64_t i = segment.begin / count; i < (segment.end + count - 1) / count; ++i)
                        tile_rows(words + (i - block / count) * kLanes, zero, w + i * QuantizedX<Bits>::quads * kLanes);
                });
            }
        }

        // Each lane's integer in its four bytes.
        static __m512i bytes(Vec v) {
            return _mm512_mullo_epi32(_mm512_cvtps_epi32(v.v), _mm512_set1_epi32(0x01010101));
        }

        static void tile_rows(const std::int32_t* word, __m512i zero, std::int32_t* out) {
            const __m512i stored = read(word).v;
            if constexpr (Bits == 8) {
                write(out, {_mm512_xor_si512(stored, _mm512_set1_epi8(-128))});
            } else {
                const Nibbles nibbles(read(word));
                write(out, {_mm512_sub_epi8(nibbles.even.v, zero)});
                write(out + kLanes, {_mm512_sub_epi8(nibbles.odd.v, zero)});
            }
        }
    };
};

// `depth` int32 of q to a tile's row; groups begin where tiles do.
template <int Bits>
void run_int8_tiles(const DequantMatmulArgs& a, int depth) {
    using Q = QuantizedX<Bits>;
    const Segments segments(a.k, a.group);
    const Q x(a, segments);
    const TiledRows tiles(a.m, x.pitch, depth);
    prepare_for(round_up(a.m, kTileSide), 1, useful_threads(a, 8.0 * a.m * a.k),
                [&](std::int64_t begin, std::int64_t end) {
                    const typename Q::Row row(x);
                    const Buffer<std::int32_t> q(x.pitch);
                    for (std::int64_t m = begin; m < end; ++m) {
                        if (m < a.m) x.fill(m, row, q.data);
                        tiles.write(m, q.data, m < a.m ? 4 * x.pitch : 0);
                    }
                });
    product_tiles(a, tiles, segments, Int8Factors<Bits>{.a = a, .segments = segments, .x = x});
}

}  // namespace
}  // namespace klfast
