// activation "exact" with several rows of x: lanes are rows of W, as in a panel, and each digit meets all rows of x as
// soon as it is a float, so that no dequantized value goes through memory. Included by the tiers only.
//
// Per vector of digits: two or three instructions to make them floats (digits.h), and an fma for each row of x, whose
// value is broadcast from L1. With lanes along k (exact_few_rows.h) each row needs vectors of x of its own, and x of
// more than two rows no longer fits in L1. A word must not belong to two groups.
#pragma once

#include "matmul/quantized/digits.h"

namespace klfast {
namespace {

constexpr std::int64_t kSeveralRows = 3, kManyRows = 17;  // from there on, gemm/fp32.h dequantizes once for many tiles

template <int Bits>
struct SeveralRows {
    using D = Digits<Bits>;
    static constexpr int count = D::count, kMost = kPanelSums;  // rows of x in a tile
    static constexpr std::int64_t kWords = kBlock / count, kPanels = 2;

    const DequantMatmulArgs& a;
    const Segments& segments;
    const std::int64_t tiles = (a.m + kMost - 1) / kMost, depth = round_up(a.k, count);
    Buffer<float> x;  // [tile][k][row], divided by the power that the digit at k carries
    const D digits{};

    SeveralRows(const DequantMatmulArgs& args, const Segments& all) : a(args), segments(all), x(a.m * depth) {
        Buffer<float> row(depth + kLanes);
        for (std::int64_t tile = 0; tile < tiles; ++tile)
            for (std::int64_t m = first(tile); m < first(tile + 1); ++m) {
                for (std::int64_t k = 0; k < depth; k += kLanes)
                    store(row.data + k,
                          k < a.k ? load(a.x, m * a.x_stride + k, a.x_type, static_cast<int>(smaller(kLanes, a.k - k)))
                                  : set(0.0f));
                const std::int64_t rows = first(tile + 1) - first(tile);
                float* const out = x.data + first(tile) * depth + m - first(tile);
                for (std::int64_t k = 0; k < depth; ++k) out[k * rows] = row[k] * digits.power[k % D::placed];
            }
    }

    std::int64_t first(std::int64_t tile) const { return a.m * tile / tiles; }  // tiles of nearly equal height

    // Words of a block and the grids of kPanels panels, one a thread.
    struct Panels {
        PanelGrid grid[kPanels];
        alignas(64) std::int32_t words[kPanels][(kWords + kLanes) * kLanes];
        explicit Panels(const DequantMatmulArgs& args) : grid{PanelGrid(args), PanelGrid(args)} {}
    };

    // total[m, p] += x[m] times words [begin, end) of panel p, in one group
    template <int M, int P>
    void segment(const Panels& panels, const float* x_at, std::int64_t begin, std::int64_t end, std::int64_t group,
                 float* total) const {
        Vec sum[M][P], zero[P][D::placed];
        for (int p = 0; p < P; ++p) digits.zeros(load(panels.grid[p].zero.data + group * kLanes), zero[p]);
        unrolled<M>([&](int m) KLFAST_INLINE { unrolled<P>([&](int p) KLFAST_INLINE { sum[m][p] = set(0.0f); }); });
        for (std::int64_t word = begin; word < end; ++word, x_at += count * M) {
            Ints low[P], high[P];
            unrolled<P>([&](int p) KLFAST_INLINE {
                low[p] = read(panels.words[p] + word * kLanes);
                high[p] = shift_right(low[p], 16);
            });
            unrolled<count>([&](int j) KLFAST_INLINE {
                Vec value[P];
                unrolled<P>([&](int p) KLFAST_INLINE {
                    value[p] = digits.value(j < D::placed ? low[p] : high[p], j % D::placed, zero[p]);
                });
                unrolled<M>([&](int m) KLFAST_INLINE {
                    const Vec v = set(x_at[j * M + m]);
                    unrolled<P>([&](int p) KLFAST_INLINE { sum[m][p] = fma(value[p], v, sum[m][p]); });
                });
            });
        }
        unrolled<P>([&](int p) KLFAST_INLINE {
            const Vec scale = load(panels.grid[p].scale.data + group * kLanes);
            unrolled<M>([&](int m) KLFAST_INLINE {
                float* const at = total + (m * P + p) * kLanes;
                store(at, fma(sum[m][p], scale, load(at)));
            });
        });
    }

    // y[m0 .. m0 + M, n0 .. n0 + P kLanes], of the block's words
    template <int M, int P>
    void block(const Panels& panels, std::int64_t m0, std::int64_t begin, float* total) const {
        segments.within(begin, begin + kBlock, [&](const Segment& seg) {
            segment<M, P>(panels, x.data + m0 * depth + seg.begin * M, (seg.begin - begin) / count,
                          (seg.end - begin + count - 1) / count, seg.group, total);
        });
    }

    template <int P, int M = kMost>
    void block(std::int64_t rows, const Panels& panels, std::int64_t m0, std::int64_t begin, float* total) const {
        if constexpr (M > 1)
            if (rows < M) return block<P, M - 1>(rows, panels, m0, begin, total);
        block<M, P>(panels, m0, begin, total);
    }

    template <int P>
    void rows(Panels& panels, std::int64_t n0, float* total) const {
        for (std::int64_t i = 0; i < a.m * P; ++i) store(total + i * kLanes, set(0.0f));
        for (int p = 0; p < P; ++p) panels.grid[p].load_panel(a, n0 + p * kLanes);
        for (std::int64_t begin = 0; begin < a.k; begin += kBlock) {
            for (int p = 0; p < P; ++p)
                load_words(a, n0 + p * kLanes, begin / count, smaller(kWords, a.words() - begin / count),
                           panels.words[p], P * kLanes);
            for (std::int64_t tile = 0; tile < tiles; ++tile)
                block<P>(first(tile + 1) - first(tile), panels, first(tile), begin, total + first(tile) * P * kLanes);
        }
        store_panels(a, 0, n0, a.m, P, total, P * kLanes);
    }

    void run() const {
        parallel_for((a.n + kLanes - 1) / kLanes, kPanels, useful_threads(a, a.m * a.n * a.k),
                     [&](std::int64_t begin, std::int64_t end) {
                         Panels panels(a);
                         Buffer<float> total(a.m * kPanels * kLanes);
                         std::int64_t panel = begin;
                         for (; panel + kPanels <= end; panel += kPanels)
                             rows<kPanels>(panels, panel * kLanes, total.data);
                         for (; panel < end; ++panel) rows<1>(panels, panel * kLanes, total.data);
                     });
    }
};

}  // namespace
}  // namespace klfast
