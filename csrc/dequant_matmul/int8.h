// activation "int8": x ~ s q, with s = max|x| / 127 and q = round(x / s), half to even, per row and group of W.
// Integer sums per segment, then  y += (sum q_x q_w - z sum q_x) (scale_w scale_x)  in float32, segment after segment,
// one product and one sum each rounded: every tier gives the same bits. Included by the tiers only.
//
// q is stored by words of W. For int8 in natural order; for int4 the eight values that meet one word become
// 0 2 4 6 | 1 3 5 7, as the lower and the upper nibbles of the word's bytes lie.
#pragma once

#include <cstring>

#include "dequant_matmul/panel.h"
#include "parallel.h"

namespace klfast {
namespace {

template <int Bits>
struct QuantizedX {
    static constexpr int count = 32 / Bits, lanes = count / 4;  // values and int32 of q for each word of W

    std::int64_t pitch;      // int32 of q in a row
    Buffer<std::int32_t> q;  // [m, pitch], zeros behind k
    Buffer<float> scale;     // [m, groups]
    Buffer<float> sum;       // [m, segments]: sums of q

    QuantizedX(const DequantMatmulArgs& a, const Segments& segments)
        : pitch(a.words() * lanes), q(a.m * pitch), scale(a.m * a.groups()), sum(a.m * segments.count) {}

    // `row` is scratch: floats for k values.
    void fill(const DequantMatmulArgs& a, const Segments& segments, std::int64_t m, float* row, std::int8_t* rounded) const {
        for (std::int64_t k = 0; k < a.k; k += W)
            store(row + k, load(a.x, m * a.x_stride + k, a.x_type, static_cast<int>(smaller(W, a.k - k))));
        for (std::int64_t g = 0; g < a.groups(); ++g) {
            const std::int64_t begin = g * a.group, end = smaller(begin + a.group, a.k);
            scale[m * a.groups() + g] = round_group(row, begin, end, rounded);
        }
        for (std::int64_t s = 0; s < segments.count; ++s) {
            std::int32_t total = 0;
            for (std::int64_t k = segments.list[s].begin; k < segments.list[s].end; ++k) total += rounded[k];
            sum[m * segments.count + s] = static_cast<float>(total);
        }
        for (std::int64_t k = a.k; k < a.words() * count; ++k) rounded[k] = 0;
        arrange(rounded, a.words(), q.data + m * pitch);
    }

private:
    // Rounds one group and returns its scale; NaN where x holds a NaN or infinity.
    static float round_group(const float* x, std::int64_t begin, std::int64_t end, std::int8_t* rounded) {
        std::int32_t largest = 0;  // magnitudes compare as their bits do, and a NaN above infinity
        for (std::int64_t k = begin; k < end; ++k) {
            const std::int32_t magnitude = __builtin_bit_cast(std::int32_t, x[k]) & 0x7fffffff;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float s = __builtin_bit_cast(float, largest) / 127.0f;
        const bool finite = largest < 0x7f800000;
        const float inverse = finite && s >= 0x1p-126f ? 1.0f / s : 0.0f;  // below the normal numbers, 1 / s overflows
        for (std::int64_t k = begin; k < end; ++k) {
            const float magic = 0x1.8p23f;  // its last place is 1: the sum is rounded to an integer, half to even
            const float v = finite ? (x[k] * inverse + magic) - magic : 0.0f;
            rounded[k] = static_cast<std::int8_t>(static_cast<std::int32_t>(v));
        }
        return finite ? s : __builtin_nanf("");
    }

    static void arrange(const std::int8_t* rounded, std::int64_t words, std::int32_t* out) {
        if constexpr (Bits == 8) {
            std::memcpy(out, rounded, words * 4);
        } else {
            for (std::int64_t w = 0; w < words; ++w) {
                std::uint64_t v;
                std::memcpy(&v, rounded + 8 * w, 8);
                const auto gather = [](std::uint64_t even) {  // bytes 0 2 4 6 to the lower four
                    even &= 0x00ff00ff00ff00ff;
                    even = (even | even >> 8) & 0x0000ffff0000ffff;
                    return static_cast<std::int32_t>(even | even >> 16);
                };
                out[2 * w] = gather(v);
                out[2 * w + 1] = gather(v >> 8);
            }
        }
    }
};

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
                 const float* x_scale, std::int64_t x_scale_pitch, const float* x_sum, std::int64_t x_sum_pitch, float* total) {
    constexpr int count = QuantizedX<Bits>::count;
    Ints sum[R];
    for (int r = 0; r < R; ++r) sum[r] = set_int(0);
    const std::int64_t first = round_up_to(begin, count), last = end / count * count;
    if (begin < first) dot_values<Bits, R>(words, q, pitch, begin, smaller(first, end), sum);
    dot_words<Bits, R>(words, q, pitch, first / count, last / count, sum);
    if (last < end && last >= first) dot_values<Bits, R>(words, q, pitch, last, end, sum);
    z = z - set(static_cast<float>(DotOperand<Bits>::offset));
    for (int r = 0; r < R; ++r) {
        const Vec exact = to_float(sum[r]) - z * set(x_sum[r * x_sum_pitch]);  // integers below 2^24
        store(total + r * W, load(total + r * W) + exact * (scale * set(x_scale[r * x_scale_pitch])));
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
    parallel_for(a.m, 1, useful_threads(a, 8 * a.m * a.k), [&](std::int64_t begin, std::int64_t end) {
        Buffer<float> row(round_up_to(a.k, W));
        Buffer<std::int8_t> rounded(a.words() * Q::count);
        for (std::int64_t m = begin; m < end; ++m) x.fill(a, segments, m, row.data, rounded.data);
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
                        add_segment_rows<Bits>(rows, static_cast<const std::int32_t*>(words), x.q.data + m * x.pitch + word * Q::lanes, x.pitch, seg.begin - block,
                                               seg.end - block, load(grid.zero.data + seg.group * W), load(grid.scale.data + seg.group * W),
                                               x.scale.data + m * a.groups() + seg.group, a.groups(), x.sum.data + m * segments.count + s,
                                               segments.count, total.data + (m - row0) * W);
                    }
                }
            }
            for (std::int64_t r = 0; r < tile_row(last) - row0; ++r) store_panel(a, row0 + r, n0, load(total.data + r * W));
        }
    });
}

}  // namespace
}  // namespace klfast
