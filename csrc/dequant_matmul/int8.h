// activation "int8": x ~ s q as quantized_x.h has it. Integer sums per segment, then
// y += (sum q_x q_w - z sum q_x) (scale_w scale_x)  in float32, segment after segment, one product and one sum each
// rounded: every tier gives the same bits. Included by the tiers only.
#pragma once

#include <cstring>

#include "dequant_matmul/quantized_x.h"
#include "parallel.h"

namespace klfast {
namespace {

// sum[r] += integer dot products of R rows of q with words [first, last) of a panel.
template <int Bits, int R>
void dot_words(const std::int32_t* words, const std::int32_t* q, std::int64_t pitch, std::int64_t first, std::int64_t last, Ints (&sum)[R]) {
    Ints local[R];  // in registers; `sum` has an address
    for (int r = 0; r < R; ++r) local[r] = sum[r];
    for (std::int64_t w = first; w < last; ++w) {
        const DotOperand<Bits> operand(read(words + w * W));
        for (int r = 0; r < R; ++r) local[r] = dot(local[r], operand, q + r * pitch + w * QuantizedX<Bits>::lanes);
    }
    for (int r = 0; r < R; ++r) sum[r] = local[r];
}

// The same for values [begin, end) of one word: the others of q are taken as 0.
template <int Bits, int R>
void dot_values(const std::int32_t* words, const std::int32_t* q, std::int64_t pitch, std::int64_t begin, std::int64_t end, Ints (&sum)[R]) {
    using Q = QuantizedX<Bits>;
    const std::int64_t word = begin / Q::count;
    std::uint8_t mask[8] = {};
    for (std::int64_t k = begin; k < end; ++k) mask[Bits == 8 ? k % 4 : k % 2 * 4 + k % 8 / 2] = 0xff;
    std::int32_t masks[Q::lanes], part[R * Q::lanes];
    std::memcpy(masks, mask, sizeof masks);
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < Q::lanes; ++i) part[r * Q::lanes + i] = q[r * pitch + word * Q::lanes + i] & masks[i];
    dot_words<Bits, R>(words + word * W, part, Q::lanes, 0, 1, sum);
}

// total[r] += the terms of one segment, for R rows of x. Positions count from the block's begin.
template <int Bits, int R>
void add_segment(const std::int32_t* words, const std::int32_t* q, std::int64_t pitch, std::int64_t begin, std::int64_t end, Vec z, Vec scale,
                 const float* x_scale, const float* x_sum, float* total) {
    constexpr int count = QuantizedX<Bits>::count;
    Ints sum[R];
    for (int r = 0; r < R; ++r) sum[r] = set_int(0);
    const std::int64_t first = round_up_to(begin, count), last = end / count * count;
    if (begin < first) dot_values<Bits, R>(words, q, pitch, begin, smaller(first, end), sum);
    dot_words<Bits, R>(words, q, pitch, first / count, last / count, sum);
    if (last < end && last >= first) dot_values<Bits, R>(words, q, pitch, last, end, sum);
    z = z - set(static_cast<float>(DotOperand<Bits>::offset));
    for (int r = 0; r < R; ++r) {
        const Vec exact = to_float(sum[r]) - z * set(x_sum[r]);  // integers below 2^24
        store(total + r * W, load(total + r * W) + exact * (scale * set(x_scale[r])));
    }
}

template <int Bits, int R = kDotRows, class... Rest>
void add_segment_rows(std::int64_t rows, Rest... rest) {
    if constexpr (R > 1)
        if (rows < R) return add_segment_rows<Bits, R - 1>(rows, rest...);
    add_segment<Bits, R>(rest...);
}

template <int Bits>
void run_int8(const DequantMatmulArgs& a, const Segments& segments) {
    using Q = QuantizedX<Bits>;
    const Q x(a, segments);
    const Buffer<std::int32_t> q(a.m * x.pitch);
    parallel_for(a.m, 1, useful_threads(a, 8 * a.m * a.k), [&](std::int64_t begin, std::int64_t end) {
        const typename Q::Row row(x);
        for (std::int64_t m = begin; m < end; ++m) x.fill(m, row, q.data + m * x.pitch);
    });
    const int threads = useful_threads(a, a.m * a.n * a.k);
    const std::int64_t tiles = (a.m + kDotRows - 1) / kDotRows, panels = (a.n + W - 1) / W;
    const auto tile_row = [&](std::int64_t tile) { return a.m * tile / tiles; };  // tiles of nearly equal height
    // Where W has few rows, several threads share a panel, each with some of the tiles.
    const std::int64_t shares = larger(1, smaller(tiles, larger(4 * threads / panels, a.m / 256)));
    parallel_for(panels * shares, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        Grid grid(a);
        Buffer<float> total((a.m / shares + 2 * kDotRows) * W);
        alignas(64) std::int32_t words[(kBlock / Q::count + W) * W];
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t n0 = item % panels * W, share = item / panels;
            const std::int64_t first = tiles * share / shares, last = tiles * (share + 1) / shares, row0 = tile_row(first);
            grid.load_panel(a, n0);
            for (std::int64_t r = 0; r < tile_row(last) - row0; ++r) store(total.data + r * W, set(0.0f));
            for (std::int64_t s = 0; s < segments.count;) {
                const std::int64_t block = segments.list[s].begin, word = block / Q::count, from = s;
                load_words(a, n0, word, smaller(kBlock / Q::count, a.words() - word), words);
                for (std::int64_t tile = first; tile < last; ++tile) {
                    const std::int64_t m = tile_row(tile), rows = tile_row(tile + 1) - m;
                    for (s = from; s < segments.count && segments.list[s].begin < block + kBlock; ++s) {
                        const Segment seg = segments.list[s];
                        add_segment_rows<Bits>(rows, static_cast<const std::int32_t*>(words), q.data + m * x.pitch + word * Q::lanes, x.pitch, seg.begin - block,
                                               seg.end - block, load(grid.zero.data + seg.group * W), load(grid.scale.data + seg.group * W),
                                               x.scale.data + seg.group * a.m + m, x.sum.data + s * a.m + m, total.data + (m - row0) * W);
                    }
                }
            }
            for (std::int64_t r = 0; r < tile_row(last) - row0; ++r) store_panel(a, row0 + r, n0, load(total.data + r * W));
        }
    });
}

}  // namespace
}  // namespace klfast
