// activation "exact" with few rows of x, on Layout.PLAIN as it lies: lanes are kLanes neighbouring words of one row of
// W, a line, and x is laid out so that each of a word's digits meets its value. Reads W once, from front to back; bound
// by memory for one row of x. Included by the tiers only.
//
// `Lines<Bits>` says how a line is multiplied, q - 2^(Bits-1) with x:
//     steps                      vectors of x for each line (int32 or float lanes)
//     arrange(x, out)            kLanes words' values of x as out[step * kLanes + lane]
//     add<R, M>(words, x, x_pitch, acc)  acc[m][r] += line r times x's row m
// A word must not belong to two groups. Zero points: sum of (q - z) x = sum of (q - 2^(Bits-1)) x - (z - 2^(Bits-1))
// sum of x.
#pragma once

#include "matmul/quantized/digits.h"

namespace klfast {
namespace {

constexpr int kFewAtOnce = 4;  // rows of x

// Which group each lane of each line belongs to, counted from the line's first.
template <int Bits>
struct LaneGroups {
    std::int64_t lines;
    bool one_a_line;            // every line lies in one group
    Buffer<std::int32_t> lane;  // [lines, kLanes]
    Buffer<std::int64_t> first;

    explicit LaneGroups(const DequantMatmulArgs& a)
        : lines((a.words() + kLanes - 1) / kLanes),
          one_a_line(a.groups() <= 1 || a.group % (kWordValues<Bits> * kLanes) == 0),
          lane(lines * kLanes),
          first(lines) {
        const std::int64_t words = larger(a.group / kWordValues<Bits>, 1), last = larger(a.groups() - 1, 0);
        std::int64_t group = 0, left = words;  // of the group; counting takes a tenth of the time of dividing
        for (std::int64_t line = 0; line < lines; ++line) {
            first[line] = group;
            for (int i = 0; i < kLanes; ++i) {
                lane[line * kLanes + i] = static_cast<std::int32_t>(group - first[line]);
                if (--left == 0) left = words, group = smaller(group + 1, last);
            }
        }
    }
};

template <template <int> class Lines, int Bits>
struct ExactFewRows {
    const DequantMatmulArgs& a;
    const LaneGroups<Bits> groups;
    const std::int64_t n_groups, grid_pitch;
    const std::int64_t pitch;  // of a row of x
    Buffer<std::int32_t> x;    // [m, lines, steps, kLanes], the bits of whatever Lines takes
    Buffer<float> sums;        // [m, lines, kLanes]: sums of a word's values of x, for zero points
    const Lines<Bits> digits{};

    explicit ExactFewRows(const DequantMatmulArgs& args)
        : a(args),
          groups(args),
          n_groups(a.groups()),
          grid_pitch(round_up(n_groups, kLanes) + kLanes),
          pitch(groups.lines * Lines<Bits>::steps * kLanes),
          x(a.m * pitch),
          sums(a.zero_point ? a.m * groups.lines * kLanes : 0) {
        constexpr int count = kWordValues<Bits>;
        Buffer<float> row(groups.lines * kLanes * count + kLanes);
        for (std::int64_t m = 0; m < a.m; ++m) {
            for (std::int64_t k = 0; k < groups.lines * kLanes * count; k += kLanes)
                store(row.data + k,
                      k < a.k ? load(a.x, m * a.x_stride + k, a.x_type, static_cast<int>(smaller(kLanes, a.k - k)))
                              : set(0.0f));
            for (std::int64_t line = 0; line < groups.lines; ++line) {
                const float* const from = row.data + line * kLanes * count;
                digits.arrange(from, x.data + m * pitch + line * Lines<Bits>::steps * kLanes);
                if (!a.zero_point) continue;
                for (int i = 0; i < kLanes; ++i) {
                    float total = 0.0f;
                    for (int j = 0; j < count; ++j) total += from[i * count + j];
                    sums[(m * groups.lines + line) * kLanes + i] = total;
                }
            }
        }
    }

    // Scales and zero points (less 2^(Bits-1)) of rows n .. n + R as floats, [R, grid_pitch] each.
    struct RowGrid {
        Buffer<float> scale, zero;
        explicit RowGrid(std::int64_t size, bool symmetric) : scale(size), zero(symmetric ? 0 : size) {}
    };

    template <int R>
    void load_grid(const RowGrid& grid, std::int64_t n) const {
        for (int r = 0; r < R; ++r)
            for (std::int64_t g = 0; g < n_groups; g += kLanes) {
                const std::int64_t left = smaller(kLanes, n_groups - g), row = n + r;
                store(grid.scale.data + r * grid_pitch + g,
                      load(a.scale, row * n_groups + g, a.scale_type, static_cast<int>(left)));
                if (!a.zero_point) continue;
                store(grid.zero.data + r * grid_pitch + g,
                      to_float(stored_zeros(a, row, g, left)) - set(static_cast<float>(1 << (Bits - 1))));
            }
    }

    // Those of one line, lane by lane.
    [[gnu::always_inline]] Vec spread(const float* of_groups, std::int64_t line) const {
        const float* const from = of_groups + groups.first[line];
        return groups.one_a_line ? set(*from) : pick(load(from), read(groups.lane.data + line * kLanes));
    }

    template <int R, int M>
    [[gnu::always_inline]] void add_line(const RowGrid& grid, std::int64_t m0, std::int64_t line,
                                         const std::int32_t* line_x, const Ints (&word)[R], Vec (&total)[M][R]) const {
        Vec acc[M][R];
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) acc[m][r] = set(0.0f);
        digits.template add<R, M>(word, line_x, pitch, acc);
        for (int r = 0; r < R; ++r) {
            if (a.zero_point) {
                const Vec z = spread(grid.zero.data + r * grid_pitch, line);
                for (int m = 0; m < M; ++m)
                    acc[m][r] = acc[m][r] - z * load(sums.data + ((m0 + m) * groups.lines + line) * kLanes);
            }
            const Vec s = spread(grid.scale.data + r * grid_pitch, line);
            for (int m = 0; m < M; ++m) total[m][r] = fma(acc[m][r], s, total[m][r]);
        }
    }

    // y[m0 .. m0 + M, n .. n + R]
    template <int R, int M>
    void tile(const RowGrid& grid, std::int64_t m0, std::int64_t n) const {
        Vec total[M][R];
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) total[m][r] = set(0.0f);
        constexpr std::int64_t bytes = kLineBytes<Bits>;
        const std::int64_t row_bytes = 4 * a.stored_words(), whole = smaller(row_bytes / bytes, groups.lines);
        const std::uint8_t* const packed = stored_row(a, n);
        const std::int32_t* line_x = x.data + m0 * pitch;
        Ints word[R];
        for (std::int64_t line = 0; line < whole; ++line, line_x += Lines<Bits>::steps * kLanes) {
            for (int r = 0; r < R; ++r) {
                const std::uint8_t* const at = packed + r * row_bytes + line * bytes;
                __builtin_prefetch(at + kAhead, 0, 2);
                word[r] = read_line<Bits>(at);
            }
            add_line<R, M>(grid, m0, line, line_x, word, total);
        }
        if (whole < groups.lines) {
            for (int r = 0; r < R; ++r)
                word[r] = read_line<Bits>(packed + r * row_bytes + whole * bytes, row_bytes - whole * bytes);
            add_line<R, M>(grid, m0, whole, line_x, word, total);
        }
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) {
                float y = sum(total[m][r]);
                if (y != y) y = in_order(m0 + m, n + r);
                if (a.bias) y += load_float(a.bias, n + r, a.bias_type);
                store_float(a.y, (m0 + m) * a.n + n + r, a.y_type, y);
            }
    }

    // One result digit by digit. Where x is infinite, parts of an integer or of its zero point may give infinities of
    // both signs, and so a NaN, though the whole has one sign.
    [[gnu::cold, gnu::noinline]] float in_order(std::int64_t m, std::int64_t n) const {
        const std::int32_t* const row = a.packed + n * a.stored_words();
        float total = 0.0f;
        for (std::int64_t k = 0; k < a.k; ++k) {
            const std::int64_t g = k / a.group;
            const std::int32_t q = value_at(row, k, 1), z = a.zero_point
                                                                ? value_at(a.zero_point + g, a.zero_row + n, n_groups)
                                                                : 1 << (Bits - 1);
            total += load_float(a.x, m * a.x_stride + k, a.x_type) *
                     (static_cast<float>(q - z) * load_float(a.scale, n * n_groups + g, a.scale_type));
        }
        return total;
    }

    // Value i of a run of packed ones, whose words lie `pitch` apart.
    static std::int32_t value_at(const std::int32_t* words, std::int64_t i, std::int64_t pitch) {
        const std::int64_t bit = i * Bits, word = bit / 32 * pitch, shift = bit % 32;
        std::uint64_t bits = static_cast<std::uint32_t>(words[word]);
        if (shift + Bits > 32)
            bits |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(words[word + pitch])) << 32;
        return static_cast<std::int32_t>(bits >> shift & ((1 << Bits) - 1));
    }

    template <int R>
    void rows(const RowGrid& grid, std::int64_t n) const {
        load_grid<R>(grid, n);
        std::int64_t m = 0;
        for (; m + kFewAtOnce <= a.m; m += kFewAtOnce) tile<R, kFewAtOnce>(grid, m, n);
        switch (a.m - m) {
            case 3: return tile<R, 3>(grid, m, n);
            case 2: return tile<R, 2>(grid, m, n);
            case 1: return tile<R, 1>(grid, m, n);
        }
    }

    void run() const {
        if (a.m <= 2)
            run<4>();
        else
            run<2>();
    }

  private:
    template <int R>
    void run() const {
        parallel_for(a.n, R, useful_threads(a, 1.0 * a.n * a.k), [&](std::int64_t begin, std::int64_t end) {
            const RowGrid grid(R * grid_pitch, a.zero_point == nullptr);
            std::int64_t n = begin;
            for (; n + R <= end; n += R) rows<R>(grid, n);
            for (; n < end; ++n) rows<1>(grid, n);
        });
    }
};

// Digits as floats, by digits.h's algebra.
template <int Bits>
struct FloatLines {
    using D = Digits<Bits>;
    static constexpr int steps = D::count;
    D digits;
    Vec zero[D::placed];

    FloatLines() { digits.zeros(set(static_cast<float>(1 << (Bits - 1))), zero); }

    void arrange(const float* x, std::int32_t* out) const {
        for (int i = 0; i < kLanes; ++i)
            for (int j = 0; j < steps; ++j)
                out[j * kLanes + i] = __builtin_bit_cast(std::int32_t, x[i * steps + j] * digits.power[j % D::placed]);
    }

    template <int R, int M>
    void add(const Ints (&words)[R], const std::int32_t* x, std::int64_t x_pitch, Vec (&acc)[M][R]) const {
        Ints high[R];
        for (int r = 0; r < R; ++r) high[r] = shift_right(words[r], D::upper);
        for (int j = 0; j < steps; ++j)
            for (int r = 0; r < R; ++r) {
                const Vec value = digits.value(j < D::placed ? words[r] : high[r], j % D::placed, zero);
                for (int m = 0; m < M; ++m)
                    acc[m][r] = fma(value, float_bits(read(x + m * x_pitch + j * kLanes)), acc[m][r]);
            }
    }
};

// Rows of W that a single line holds: adding up its lanes takes longer than the products; exact_several_rows.h does
// not.
inline bool is_narrow(const DequantMatmulArgs& a) { return a.words() <= kLanes; }

template <int Bits>
bool words_within_groups(const DequantMatmulArgs& a) {
    return a.group % kWordValues<Bits> == 0 || a.groups() <= 1;
}

}  // namespace
}  // namespace klfast
