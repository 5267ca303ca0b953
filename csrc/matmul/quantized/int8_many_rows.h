// activation "int8" with many rows of x: x ~ s q as int8_activations.h has it. Integer sums per segment, then
// y += (sum q_x q_w - z sum q_x) (scale_w scale_x)  in float32, segment after segment, one product and one sum each
// rounded: every tier gives the same bits. Included by the tiers only.
//
// Up to kDotVectors panels of W at a time are laid out whole, a quad of bytes of each lane's row side by side, in a
// buffer that stays in L2 and meets all rows of x in tiles of kDotRows x kDotVectors accumulators.
#pragma once

#include <cstring>

#include "matmul/quantized/int8_activations.h"
#include "gemm/partition.h"

namespace klfast {
namespace {

// W as quads [quad][vector][lane], in the order in which x has them, with scales and zero points as
// [group][vector][lane].
template <int Bits>
struct QuadPanels {
    static constexpr int count = QuantizedX<Bits>::count, quads = QuantizedX<Bits>::quads;

    const DequantMatmulArgs& a;
    Buffer<std::int32_t> weights;
    Buffer<float> scale, zero;  // zero: less what the dot products take off themselves

    explicit QuadPanels(const DequantMatmulArgs& args)
        : a(args),
          weights(a.words() * quads * kDotVectors * kLanes),
          scale(a.groups() * kDotVectors * kLanes),
          zero(a.groups() * kDotVectors * kLanes),
          grid_(a) {}

    // Rows n0 .. n0 + vectors kLanes.
    void load(std::int64_t n0, std::int64_t vectors) {
        const Vec offset = set(static_cast<float>(DotOperand<Bits>::offset));
        for (std::int64_t v = 0; v < vectors; ++v) {
            grid_.load_panel(a, n0 + v * kLanes);
            for (std::int64_t g = 0; g < a.groups(); ++g) {
                store(scale.data + (g * vectors + v) * kLanes, klfast::load(grid_.scale.data + g * kLanes));
                store(zero.data + (g * vectors + v) * kLanes, klfast::load(grid_.zero.data + g * kLanes) - offset);
            }
            for (std::int64_t first = 0; first < a.words(); first += kWords) {
                const std::int64_t words = smaller(kWords, a.words() - first);
                load_words(a, n0 + v * kLanes, first, words, words_);
                for (std::int64_t w = 0; w < words; ++w)
                    write_quads(read(words_ + w * kLanes), weights.data + ((first + w) * quads * vectors + v) * kLanes,
                                vectors * kLanes);
            }
        }
    }

  private:
    static constexpr std::int64_t kWords = kBlock / count;
    PanelGrid grid_;
    alignas(64) std::int32_t words_[(kWords + kLanes) * kLanes];

    static void write_quads(Ints word, std::int32_t* out, std::int64_t pitch) {
        Ints quad[quads];
        split<Bits>(word, quad);
        for (int j = 0; j < quads; ++j) write(out + j * pitch, quad[j]);
    }
};

// out[r][v] = integer dot products of R rows of q with quads [first, last) of V vectors; with Add, on top of what it
// holds. Loops as short as these the compiler unrolls in time to keep the sums in registers.
template <int Bits, int R, int V, bool Add>
void dot_quads(const std::int32_t* weights, const std::int32_t* q, std::int64_t pitch, std::int64_t first,
               std::int64_t last, std::int32_t* out) {
    using Operand = DotOperand<Bits>;
    Ints sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = Add ? read(out + (r * V + v) * kLanes) : set_int(0);
    for (std::int64_t i = first; i < last; i += Operand::quads) {
        Operand w[V];
        Ints quad[Operand::quads], x[Operand::quads];
        for (int v = 0; v < V; ++v) {
            for (int j = 0; j < Operand::quads; ++j) quad[j] = read(weights + ((i + j) * V + v) * kLanes);
            w[v] = Operand(quad);
        }
        for (int r = 0; r < R; ++r) {
            for (int j = 0; j < Operand::quads; ++j) x[j] = set_int(q[r * pitch + i + j]);
            for (int v = 0; v < V; ++v) sum[r][v] = dot(sum[r][v], w[v], x);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) write(out + (r * V + v) * kLanes, sum[r][v]);
}

// out += those of values [begin, end) of one word: the others of q are taken as 0.
template <int Bits, int R, int V>
void dot_values(const std::int32_t* weights, const std::int32_t* q, std::int64_t pitch, std::int64_t begin,
                std::int64_t end, std::int32_t* out) {
    constexpr int count = QuantizedX<Bits>::count, quads = QuantizedX<Bits>::quads;
    const std::int64_t word = begin / count;
    std::uint8_t mask[8] = {};
    for (std::int64_t k = begin; k < end; ++k) mask[Bits != 4 ? k % 4 : k % 2 * 4 + k % 8 / 2] = 0xff;
    std::int32_t masks[quads], part[R * quads];
    std::memcpy(masks, mask, sizeof masks);
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < quads; ++i) part[r * quads + i] = q[r * pitch + word * quads + i] & masks[i];
    dot_quads<Bits, R, V, true>(weights + word * quads * V * kLanes, part, quads, 0, quads, out);
}

// total[r][v] += the terms of one segment.
template <int Bits, int R, int V>
void add_segment(const QuadPanels<Bits>& panels, const std::int32_t* q, std::int64_t pitch, const Segment& segment,
                 const float* x_scale, const float* x_sum, float* total) {
    constexpr int count = QuantizedX<Bits>::count, quads = QuantizedX<Bits>::quads;
    const std::int32_t* const weights = panels.weights.data;
    const std::int64_t begin = segment.begin, end = segment.end, first = round_up(begin, count),
                       last = end / count * count;
    alignas(64) std::int32_t sum[R * V * kLanes];
    dot_quads<Bits, R, V, false>(weights, q, pitch, first / count * quads, last / count * quads, sum);
    if (begin < first) dot_values<Bits, R, V>(weights, q, pitch, begin, smaller(first, end), sum);
    if (last < end && last >= first) dot_values<Bits, R, V>(weights, q, pitch, last, end, sum);
    for (int v = 0; v < V; ++v) {
        const Vec scale = load(panels.scale.data + (segment.group * V + v) * kLanes),
                  zero = load(panels.zero.data + (segment.group * V + v) * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec exact =
                fma(zero, set(-x_sum[r]), to_float(read(sum + (r * V + v) * kLanes)));  // integers below 2^24
            float* const to = total + (r * V + v) * kLanes;
            store(to, load(to) + exact * (scale * set(x_scale[r])));
        }
    }
}

// y[m .. m + R, n0 .. n0 + V kLanes]
template <int Bits, int R, int V>
void int8_tile(const DequantMatmulArgs& a, const Segments& segments, const QuantizedX<Bits>& x,
               const QuadPanels<Bits>& panels, const std::int32_t* q, std::int64_t m, std::int64_t n0) {
    alignas(64) float total[R * V * kLanes];
    for (int i = 0; i < R * V; ++i) store(total + i * kLanes, set(0.0f));
    for (std::int64_t s = 0; s < segments.count; ++s) {
        const Segment& segment = segments.list[s];
        add_segment<Bits, R, V>(panels, q + m * x.pitch, x.pitch, segment, x.scale.data + segment.group * a.m + m,
                                x.sum.data + s * a.m + m, total);
    }
    store_panels(a, m, n0, R, V, total, V * kLanes);
}

template <int Bits, int V, int R = kDotRows, class... Rest>
void int8_rows(std::int64_t rows, const Rest&... rest) {
    if constexpr (R > 1)
        if (rows < R) return int8_rows<Bits, V, R - 1>(rows, rest...);
    int8_tile<Bits, R, V>(rest...);
}

template <int Bits, int V = kDotVectors, class... Rest>
void int8_vectors(std::int64_t vectors, const Rest&... rest) {
    if constexpr (V > 1)
        if (vectors < V) return int8_vectors<Bits, V - 1>(vectors, rest...);
    int8_rows<Bits, V>(rest...);
}

template <int Bits>
void run_int8(const DequantMatmulArgs& a, const Segments& segments) {
    using Q = QuantizedX<Bits>;
    const Q x(a, segments);
    const Buffer<std::int32_t> q(a.m * x.pitch);
    x.fill(q.data);
    const int threads = useful_threads(a, 1.0 * a.m * a.n * a.k);
    const std::int64_t tiles = (a.m + kDotRows - 1) / kDotRows;
    const Division division(a, kDotVectors, tiles, threads);
    parallel_for(division.count(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        QuadPanels<Bits> panels(a);
        for (std::int64_t i = begin; i < end; ++i) {
            const Division::Item item = division[i];
            panels.load(item.v0 * kLanes, item.width);
            for (std::int64_t tile = item.first; tile < item.last; ++tile) {
                const std::int64_t m = a.m * tile / tiles, rows = a.m * (tile + 1) / tiles - m;
                int8_vectors<Bits>(item.width, rows, a, segments, x, panels, static_cast<const std::int32_t*>(q.data),
                                   m, item.v0 * kLanes);
            }
        }
    });
}

}  // namespace
}  // namespace klfast
