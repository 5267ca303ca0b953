// x W^T by tiles: blocks of 32 x 32 of y in four accumulators, two tiles of x and two of W a step: four products for
// four loads. Included by the tier amx only.
//
// x and W are laid out in tiles of their own, one behind the other along k, each element of 32 bits a pair of bf16 or a
// quad of int8 (simd/amx.h). Up to four vectors of W are a panel, which stays in L2 and meets all rows of x. Sums are
// taken segment by segment: a tile cannot be scaled, so it goes to memory and a segment's terms are added to totals
// that stay in L1. The two halves of a panel take turns, so that the segment of x comes from L1 the second time; and
// the terms of one block are added between the tile instructions of the next, for both have execution units of their
// own.
#pragma once

#include "gemm/partition.h"
#include "gemm/segments.h"
#include "simd/amx.h"

namespace klfast {
namespace {

constexpr int kBlockRows = 2 * kTileSide, kBlockVectors = 2, kPanelVectors = 4;
constexpr int kSumsPitch = kBlockVectors * kLanes, kTotalPitch = kPanelVectors * kLanes;
static_assert(kLanes == kTileSide);

// A configuration of this thread's tiles: 0 to 3 take sums, 4 and 5 x, 6 and 7 W, with `depth` elements along k.
struct TilesInUse {
    explicit TilesInUse(int depth) {
        TileConfig config;
        for (int t = 0; t < kTileRegisters; ++t) {
            config.rows[t] = static_cast<std::uint8_t>(t < 6 ? kTileSide : depth);
            config.row_bytes[t] = static_cast<std::uint16_t>(t == 4 || t == 5 ? 4 * depth : kTileRowBytes);
        }
        tile_configure(config);
    }
    ~TilesInUse() { tile_release(); }
    TilesInUse(const TilesInUse&) = delete;
    TilesInUse& operator=(const TilesInUse&) = delete;
};

// Rows of x as [m / 16][step][m % 16][depth] elements, zeros behind the last value.
struct TiledRows {
    std::int64_t depth, steps, pitch;  // pitch: elements from sixteen rows to the next
    Buffer<std::int32_t> data;

    TiledRows(std::int64_t m, std::int64_t elements, int tile_depth)
        : depth(tile_depth),
          steps((elements + depth - 1) / depth),
          pitch(steps * kTileSide * depth),
          data((m + kTileSide - 1) / kTileSide * pitch) {}

    void write(std::int64_t m, const void* values, std::int64_t bytes) const {
        std::int32_t* to = data.data + m / kTileSide * pitch + m % kTileSide * depth;
        const char* from = static_cast<const char*>(values);
        for (std::int64_t step = 0; step < steps;
             ++step, to += kTileSide * depth, from += 4 * depth, bytes -= 4 * depth) {
            const __mmask64 mask = bytes >= 4 * depth ? ~__mmask64{0} >> (64 - 4 * depth)
                                   : bytes > 0        ? ~__mmask64{0} >> (64 - bytes)
                                                      : 0;
            _mm512_mask_storeu_epi32(to, first(static_cast<int>(depth)), _mm512_maskz_loadu_epi8(mask, from));
        }
    }
};

// The terms of one block, still to be added to its totals.
template <class Terms>
struct Waiting {
    Terms terms{};
    float* total = nullptr;
    std::int64_t rows = 0;
};

// sums[R 16, V kLanes] = `steps` tiles of x by as many of W. Meanwhile adds the terms that wait, made of what `sums`
// held before: `Share` rows of them a step, written out, or if 0 all of them at the end. Not inlined: it needs most of
// the registers.
template <class Factors, int R, int V, int Share>
[[gnu::noinline]] void multiply(const std::int32_t* x, const std::int32_t* w, std::int64_t pitch, std::ptrdiff_t depth,
                                std::int64_t steps, std::int32_t* sums,
                                const Waiting<typename Factors::Terms>& waiting) {
    const auto terms = waiting.terms;
    const std::int32_t* from = sums;
    float* to = waiting.total;
    std::int64_t row = 0;
    tile_zero<0>();
    if constexpr (V == 2) tile_zero<1>();
    if constexpr (R == 2) tile_zero<2>();
    if constexpr (R == 2 && V == 2) tile_zero<3>();
    for (const std::int32_t* const end = x + steps * kTileSide * depth; x != end;
         x += kTileSide * depth, w += kTileSide * depth) {
        tile_load<4>(x, 4 * depth);
        tile_load<6>(w, kTileRowBytes);
        Factors::template dot<0, 4, 6>();
        if constexpr (V == 2) {
            tile_load<7>(w + pitch, kTileRowBytes);
            Factors::template dot<1, 4, 7>();
        }
        if constexpr (R == 2) {
            tile_load<5>(x + pitch, 4 * depth);
            Factors::template dot<2, 5, 6>();
            if constexpr (V == 2) Factors::template dot<3, 5, 7>();
        }
        unrolled<Share>([&](int r) KLFAST_INLINE { terms.add(from + r * kSumsPitch, to + r * kTotalPitch, row + r); });
        row += Share, from += Share * kSumsPitch, to += Share * kTotalPitch;
    }
    for (; row < waiting.rows; ++row, from += kSumsPitch, to += kTotalPitch) terms.add(from, to, row);
    constexpr std::ptrdiff_t stride = 4 * kSumsPitch;
    tile_store<0>(sums, stride);
    if constexpr (V == 2) tile_store<1>(sums + kLanes, stride);
    if constexpr (R == 2) tile_store<2>(sums + kTileSide * kSumsPitch, stride);
    if constexpr (R == 2 && V == 2) tile_store<3>(sums + kTileSide * kSumsPitch + kLanes, stride);
}

template <class Factors>
void multiply(std::int64_t rows, std::int64_t vectors, const std::int32_t* x, const std::int32_t* w, std::int64_t pitch,
              std::ptrdiff_t depth, std::int64_t steps, std::int32_t* sums,
              const Waiting<typename Factors::Terms>& waiting) {
    const auto call = [&](auto* function) KLFAST_INLINE { function(x, w, pitch, depth, steps, sums, waiting); };
    if (rows <= kTileSide) return call(vectors > 1 ? multiply<Factors, 1, 2, 0> : multiply<Factors, 1, 1, 0>);
    if (vectors == 1) return call(multiply<Factors, 2, 1, 0>);
    if (waiting.rows < kBlockRows) return call(multiply<Factors, 2, 2, 0>);
    switch (steps) {  // a division would cost as much as two products
        case 2: return call(multiply<Factors, 2, 2, kBlockRows / 2>);
        case 4: return call(multiply<Factors, 2, 2, kBlockRows / 4>);
        case 8: return call(multiply<Factors, 2, 2, kBlockRows / 8>);
        default: return call(multiply<Factors, 2, 2, 0>);
    }
}

// `Factors` says what is multiplied and what the sums stand for:
//     values        of an element
//     dot<C, A, B>  the product of tiles
//     Panel(factors, pitch), one a thread, has
//         load(n0, vectors, w)     writes rows n0 .. n0 + vectors kLanes as tiles, those of a vector `pitch` from the
//                                  last's
//         terms(segment, s, m, v)  what turns sums of rows m.. and vectors v, v + 1 over segment s into terms:
//             add(sums, total, row)  adds those of row m + row to its totals
template <class Factors>
void product_tiles(const Product& a, const TiledRows& x, const Segments& segments, const Factors& factors) {
    const int threads = useful_threads(a, 0.0625 * a.m * a.n * a.k);
    const std::int64_t blocks = (a.m + kBlockRows - 1) / kBlockRows;
    // A share's rows of x fit in L2 beside a panel. For fewer than 256 rows, panels would be laid out too often.
    const std::int64_t least = smaller(a.m / 256, a.m * x.steps * x.depth * 4 / (1 << 20));
    const Division division(a, kPanelVectors, blocks, threads, least);
    const std::int64_t values = Factors::values * x.depth;  // of a step
    parallel_for(division.count(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const TilesInUse in_use(static_cast<int>(x.depth));
        typename Factors::Panel panel(factors, x.pitch);
        Buffer<std::int32_t> weights(kPanelVectors * x.pitch);
        alignas(64) std::int32_t sums[kBlockRows * kSumsPitch] = {};
        alignas(64) float total[kBlockRows * kTotalPitch];
        for (std::int64_t i = begin; i < end; ++i) {
            const Division::Item item = division[i];
            panel.load(item.v0 * kLanes, item.width, weights.data);
            for (std::int64_t block = item.first; block < item.last; ++block) {
                const std::int64_t m = block * kBlockRows, rows = smaller(kBlockRows, a.m - m);
                const std::int32_t* const x_tiles = x.data.data + m / kTileSide * x.pitch;
                for (int j = 0; j < kBlockRows * kTotalPitch; j += kLanes) store(total + j, set(0.0f));
                Waiting<typename Factors::Terms> waiting;
                for (std::int64_t s = 0; s < segments.count; ++s) {
                    const Segment segment = segments.list[s];
                    const std::int64_t offset = segment.begin / values * kTileSide * x.depth,
                                       steps = (segment.end - segment.begin + values - 1) / values;
                    for (std::int64_t v = 0; v < item.width; v += kBlockVectors) {
                        multiply<Factors>(rows, item.width - v, x_tiles + offset, weights.data + v * x.pitch + offset,
                                          x.pitch, x.depth, steps, sums, waiting);
                        waiting = {.terms = panel.terms(segment, s, m, v), .total = total + v * kLanes, .rows = rows};
                    }
                }
                for (std::int64_t r = 0; r < waiting.rows; ++r)
                    waiting.terms.add(sums + r * kSumsPitch, waiting.total + r * kTotalPitch, r);
                store_panels(a, m, item.v0 * kLanes, rows, item.width, total, kTotalPitch);
            }
        }
    });
}

}  // namespace
}  // namespace klfast
