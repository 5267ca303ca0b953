// x W^T for many rows of bf16 x by tiles: gemm/bf16.h's algebra and its sources, a vector of W at a time, whose pairs
// are then tiles already. A scale must belong to a multiple of 32 values, or to a whole row. Included by the tier amx
// only.
#pragma once

#include "gemm/amx.h"

namespace klfast {
namespace {

template <class Source>
struct Bf16Factors {
    static constexpr int values = 2;
    const Source& source;
    std::int64_t k, groups;

    template <int C, int A, int B>
    [[gnu::always_inline]] static void dot() {
        tile_dot_bf16<C, A, B>();
    }

    struct Terms {
        Vec scale[kBlockVectors];

        [[gnu::always_inline]] void add(const std::int32_t* sums, float* total, std::int64_t) const {
            for (int v = 0; v < kBlockVectors; ++v)
                store(total + v * kLanes, fma(float_bits(read(sums + v * kLanes)), scale[v], load(total + v * kLanes)));
        }
    };

    struct Panel {
        typename Source::Panels panels;
        std::int64_t k, groups, pitch;
        Buffer<float> scale;

        Panel(const Bf16Factors& factors, std::int64_t tiles_pitch)
            : panels(factors.source),
              k(factors.k),
              groups(factors.groups),
              pitch(tiles_pitch),
              scale(kPanelVectors * groups * kLanes) {}

        void load(std::int64_t n0, std::int64_t vectors, std::int32_t* w) {
            for (std::int64_t v = 0; v < vectors; ++v) {
                for (std::int64_t i = (k + 1) / 2 * kLanes; i < pitch; i += kLanes)
                    write(w + v * pitch + i, set_int(0));
                panels.load(n0 + v * kLanes, 1, w + v * pitch, scale.data + v * groups * kLanes);
            }
            if (vectors % 2)  // the last block is a vector short
                for (std::int64_t i = 0; i < groups * kLanes; i += kLanes)
                    store(scale.data + vectors * groups * kLanes + i, set(0.0f));
        }

        Terms terms(const Segment& segment, std::int64_t, std::int64_t, std::int64_t v) const {
            const float* const from = scale.data + (v * groups + segment.group) * kLanes;
            return {{klfast::load(from), klfast::load(from + groups * kLanes)}};
        }
    };
};

template <class Source>
void product_bf16_tiles(const Product& a, const Source& source) {
    constexpr int depth = kTileRowBytes / 4;
    const std::int64_t group = larger(1, smaller(source.depth, a.k));
    const TiledRows x(a.m, (a.k + 1) / 2, depth);
    prepare_for(round_up(a.m, kTileSide), 1, useful_threads(a, 1.0 * a.m * a.k),
                [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t m = begin; m < end; ++m)
                        x.write(m, static_cast<const std::uint16_t*>(a.x) + (m < a.m ? m * a.x_stride : 0),
                                m < a.m ? 2 * a.k : 0);
                });
    product_tiles(a, x, Segments(a.k, group),
                  Bf16Factors<Source>{.source = source, .k = a.k, .groups = larger(1, (a.k + group - 1) / group)});
}

}  // namespace
}  // namespace klfast
