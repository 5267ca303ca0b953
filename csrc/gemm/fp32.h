// x W^T in float32 for many rows of x: two panels of W at a time are laid out as floats, a block of values after the
// other, in a buffer that stays in L1 or L2 and meets all rows of x in register tiles. Included by the tiers only.
//
// `Source` says what W is stored as. Source::Panels(source), one a thread, has
//     load(n0)                    takes the two panels from row n0 on,
//     fill(block, depth, floats)  writes values [block, block + depth) of each as floats[k * kPair + lane].
#pragma once

#include "gemm/common.h"
#include "gemm/tile.h"

namespace klfast {
namespace {

constexpr std::int64_t kChunkM = 512;  // rows of x held as floats at a time

// Rows of x as float32 tiles of up to kTileRows rows: [tile][block][row][kBlock].
struct XTiles {
    std::int64_t m, count, blocks;
    Buffer<float> data;

    XTiles(const Product& a, std::int64_t rows)
        : m(rows),
          count((rows + kTileRows - 1) / kTileRows),
          blocks((a.k + kBlock - 1) / kBlock),
          data(rows * blocks * kBlock) {}

    std::int64_t row(std::int64_t tile) const { return m * tile / count; }  // tiles of nearly equal height
    float* at(std::int64_t tile, std::int64_t block) const {
        return data.data + (row(tile) * blocks + block * (row(tile + 1) - row(tile))) * kBlock;
    }

    void fill(const Product& a, std::int64_t m0, std::int64_t tile) const {
        const std::int64_t first = row(tile), rows = row(tile + 1) - first;
        for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t k = 0; k < a.k; k += kLanes)
                store(
                    at(tile, k / kBlock) + r * kBlock + k % kBlock,
                    load(a.x, (m0 + first + r) * a.x_stride + k, a.x_type, static_cast<int>(smaller(kLanes, a.k - k))));
    }
};

template <class Source>
void product_fp32(const Product& a, const Source& source) {
    const int threads = useful_threads(a, 1.0 * a.m * a.n * a.k);
    for (std::int64_t m0 = 0; m0 < a.m; m0 += kChunkM) {
        const XTiles tiles(a, smaller(kChunkM, a.m - m0));
        prepare_for(tiles.count, 1, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t tile = begin; tile < end; ++tile) tiles.fill(a, m0, tile);
        });
        // Where W has few rows, several threads share a pair of panels, each with some of the tiles.
        const std::int64_t pairs = (a.n + kPair - 1) / kPair,
                           shares = larger(1, smaller(tiles.count, 4 * threads / pairs));
        parallel_for(pairs * shares, 1, threads, [&](std::int64_t begin, std::int64_t end) {
            typename Source::Panels panels(source);
            Buffer<float> weights(kBlock * kPair), sums((tiles.m / shares + kTileRows) * kPair);
            for (std::int64_t item = begin; item < end; ++item) {
                const std::int64_t n0 = item / shares * kPair;
                const std::int64_t first = tiles.count * (item % shares) / shares,
                                   last = tiles.count * (item % shares + 1) / shares;
                const std::int64_t row0 = tiles.row(first), rows = tiles.row(last) - row0;
                panels.load(n0);
                for (std::int64_t i = 0; i < rows * kPair; i += kLanes) store(sums.data + i, set(0.0f));
                for (std::int64_t block = 0; block < a.k; block += kBlock) {
                    const std::int64_t depth = smaller(kBlock, a.k - block);
                    panels.fill(block, depth, weights.data);
                    for (std::int64_t tile = first; tile < last; ++tile)
                        tile_product(tiles.row(tile + 1) - tiles.row(tile), tiles.at(tile, block / kBlock),
                                     weights.data, depth, sums.data + (tiles.row(tile) - row0) * kPair);
                }
                store_panels(a, m0 + row0, n0, rows, n0 + kLanes < a.n ? 2 : 1, sums.data, kPair);
            }
        });
    }
}

}  // namespace
}  // namespace klfast
