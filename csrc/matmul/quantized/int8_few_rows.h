// activation "int8" with few rows of x, int8_many_rows.h's algebra on Layout.PLAIN as it lies: lanes are kLanes
// neighbouring words of one row of W, a line, and x is laid out so that each quad of bytes meets its own. A segment's
// lanes are added up for kLanes rows at once, which leaves one row a lane and the terms as int8_many_rows.h has them:
// the same bits. Included by the tiers only.
#pragma once

#include "matmul/quantized/int8_activations.h"

namespace klfast {
namespace {

// Segments that are whole lines, or equal parts of one, of at least four words.
template <int Bits>
bool segments_fit_lines(const DequantMatmulArgs& a) {
    return a.groups() <= 1 || a.group % kBlock == 0 || (kBlock % a.group == 0 && a.group / kWordValues<Bits> >= 4);
}

template <int Bits>
struct Int8FewRows {
    using Q = QuantizedX<Bits>;
    static constexpr int kFolds = kLanes / kFoldRows;  // of a panel's rows

    const DequantMatmulArgs& a;
    const Segments& segments;
    const Q quantized;
    const std::int64_t lines_a_step, steps;     // a step: one line, or as many as a segment has
    const std::int64_t row_bytes, whole_steps;  // of W: a row, and how many steps it fills
    const std::int64_t pitch;                   // int32 of a row of x
    Buffer<std::int32_t> x;                     // [m, line, quad, lane], zeros behind the last

    Int8FewRows(const DequantMatmulArgs& args, const Segments& all)
        : a(args),
          segments(all),
          quantized(a, segments),
          lines_a_step(larger(words_of_segment() / kLanes, 1)),
          steps((a.words() + lines_a_step * kLanes - 1) / (lines_a_step * kLanes)),
          row_bytes(4 * a.stored_words()),
          whole_steps(smaller(row_bytes / (lines_a_step * kLineBytes<Bits>), steps)),
          pitch(steps * lines_a_step * Q::quads * kLanes),
          x(a.m * pitch) {
        const Buffer<std::int32_t> q(a.m * quantized.pitch);
        const std::int64_t words = a.words();
        quantized.fill(q.data);
        for (std::int64_t m = 0; m < a.m; ++m)
            for (std::int64_t word = 0; word < pitch / Q::quads; ++word)
                for (int j = 0; j < Q::quads; ++j)
                    x[m * pitch + (word / kLanes * Q::quads + j) * kLanes + word % kLanes] =
                        word < words ? q[m * quantized.pitch + word * Q::quads + j] : 0;
    }

    void run() const {
        switch (larger(kLanes / words_of_segment(), 1)) {
            case 1: return run<1>();
            case 2:
                if constexpr (kLanes >= 8) return run<2>();
                break;
            case 4:
                if constexpr (kLanes >= 16) return run<4>();
                break;
        }
    }

  private:
    std::int64_t words_of_segment() const {
        return smaller(a.groups() <= 1 ? kBlock : a.group, kBlock) / kWordValues<Bits>;
    }

    // Folded sums of each step for rows n .. n + kFoldRows of W and m .. m + M of x: [step, M, kFolds, kLanes], from
    // `out` on.
    template <int M>
    void dot_rows(std::int64_t n, std::int64_t m, std::int32_t* out) const {
        if (lines_a_step == 1) return dot_rows<M, 1>(n, m, out);
        dot_rows<M, 0>(n, m, out);
    }

    // For steps of that many lines, 0: of any number. All addresses follow from a line's number, so few registers do.
    template <int M, int Lines>
    void dot_rows(std::int64_t n, std::int64_t m, std::int32_t* out) const {
        constexpr std::int64_t bytes = kLineBytes<Bits>, line_x = Q::quads * kLanes;
        const std::int64_t lines = Lines > 0 ? Lines : lines_a_step;
        const std::uint8_t* row[kFoldRows];
        for (int r = 0; r < kFoldRows; ++r) row[r] = stored_row(a, 0) + smaller(n + r, a.n - 1) * row_bytes;
        const std::uint8_t* const ahead = row[0] + kAhead;  // in the order in which lines lie: docs/KERNEL_NOTES.md
        const std::int32_t* const first_x = x.data + m * pitch;
        const auto do_step = [&](std::int64_t step, const auto& line_of) KLFAST_INLINE {
            Ints sum[M][kFoldRows];
            unrolled<M>([&](int i) KLFAST_INLINE {
                unrolled<kFoldRows>([&](int r) KLFAST_INLINE { sum[i][r] = set_int(0); });
            });
            for (std::int64_t line = step * lines; line < (step + 1) * lines; ++line)
                unrolled<kFoldRows>([&](int r) KLFAST_INLINE {
                    Ints quad[Q::quads];
                    split<Bits>(as_words<Bits>(line_of(r, line * bytes)), quad);
                    unrolled<M>([&](int i) KLFAST_INLINE {
                        sum[i][r] = add(sum[i][r], quad, first_x + line * line_x + i * pitch);
                    });
                });
            unrolled<M>([&](int i) KLFAST_INLINE { write(out + (step * M + i) * kFolds * kLanes, fold(sum[i])); });
        };
        for (std::int64_t step = 0; step < whole_steps; ++step)
            do_step(step, [&](int r, std::int64_t at) KLFAST_INLINE {
                if (r % larger(64 / bytes, 1) == 0) __builtin_prefetch(ahead + at * kFoldRows + r * bytes, 0, 3);
                return read_line<Bits>(row[r] + at);
            });
        for (std::int64_t step = whole_steps; step < steps; ++step)
            do_step(step, [&](int r, std::int64_t at) KLFAST_INLINE {
                return read_line<Bits>(row[r] + smaller(at, row_bytes), row_bytes - at);
            });
    }

    [[gnu::always_inline]] static Ints add(Ints sum, const Ints (&quad)[Q::quads], const std::int32_t* line_x) {
        using Operand = DotOperand<Bits>;
        Ints of_x[Q::quads];
        unrolled<Q::quads>([&](int j) KLFAST_INLINE { of_x[j] = read(line_x + j * kLanes); });
        unrolled<Q::quads / Operand::quads>([&](int j) KLFAST_INLINE {
            sum = dot(sum, Operand(quad + j * Operand::quads), of_x + j * Operand::quads);
        });
        return sum;
    }

    // y[m .. m + M, n0 .. n0 + kLanes], for S segments a step
    template <int S, int M>
    void tile(const PanelGrid& grid, std::int32_t* folded, std::int64_t m, std::int64_t n0) const {
        for (int f = 0; f < kFolds; ++f) dot_rows<M>(n0 + f * kFoldRows, m, folded + f * kLanes);
        const Vec offset = set(static_cast<float>(DotOperand<Bits>::offset));
        const Segment* segment = segments.list.data;
        const float *x_sum = quantized.sum.data + m, *const x_scale = quantized.scale.data + m;
        const float *const zeros = grid.zero.data, *const scales = grid.scale.data;
        const std::int64_t of_x = a.m, whole = segments.count / S;
        Vec total[M];
        unrolled<M>([&](int i) KLFAST_INLINE { total[i] = set(0.0f); });
        const auto add_segments = [&](int count) KLFAST_INLINE {
            Ints sum[M][S];
            unrolled<M>([&](int i) KLFAST_INLINE { sums_of_rows<S>(folded + i * kFolds * kLanes, sum[i]); });
            unrolled<S>([&](int j) KLFAST_INLINE {
                if (j >= count) return;
                const std::int64_t group = segment->group;
                const Vec zero = load(zeros + group * kLanes) - offset, scale = load(scales + group * kLanes);
                unrolled<M>([&](int i) KLFAST_INLINE {
                    const Vec exact = fma(zero, set(-x_sum[i]), to_float(sum[i][j]));  // integers below 2^24
                    total[i] = total[i] + exact * (scale * set(x_scale[group * of_x + i]));
                });
                ++segment, x_sum += of_x;
            });
            folded += M * kFolds * kLanes;
        };
        for (std::int64_t step = 0; step < whole; ++step) add_segments(S);
        if (segments.count > whole * S) add_segments(static_cast<int>(segments.count - whole * S));
        for (int i = 0; i < M; ++i) store_panel(a, m + i, n0, total[i], a.bias_from(m + i));
    }

    template <int S, int M = kFewDotRows>
    void rows(const PanelGrid& grid, std::int32_t* folded, std::int64_t m, std::int64_t n0) const {
        for (; m + M <= a.m; m += M) tile<S, M>(grid, folded, m, n0);
        if constexpr (M > 1) rows<S, M / 2>(grid, folded, m, n0);
    }

    template <int S>
    void run() const {
        parallel_for((a.n + kLanes - 1) / kLanes, 1, useful_threads(a, 1.0 * a.n * a.k),
                     [&](std::int64_t begin, std::int64_t end) {
                         PanelGrid grid(a);
                         const Buffer<std::int32_t> folded(steps * kFewDotRows * kFolds * kLanes);
                         for (std::int64_t panel = begin; panel < end; ++panel) {
                             grid.load_panel(a, panel * kLanes);
                             rows<S>(grid, folded.data, 0, panel * kLanes);
                         }
                     });
    }
};

}  // namespace
}  // namespace klfast
