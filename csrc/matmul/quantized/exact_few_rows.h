// activation "exact" with few rows of x, on Layout.PLAIN as it lies: lanes are kLanes neighbouring words of one row of
// W, a line, and x is laid out so that each of a word's digits meets its value. Reads W once, from front to back; bound
// by memory for one row of x. Included by the tiers only.
//
// `Lines<Bits>` says how a line is multiplied, q - 2^(Bits-1) with x:
//     steps                      vectors of x for each line (int32 or float lanes)
//     kUnits                     whether lines have units of their own: then for one row of x only
//     arrange(x, out)            kLanes words' values of x as out[step * kLanes + lane]; returns their unit, a power of
//                                two, or 1
//     add<R, M>(words, x, x_pitch, unit, acc)  acc[m][r] += line r times x's row m, in that unit
// A word must not belong to two groups. Zero points: sum of (q - z) x = sum of (q - 2^(Bits-1)) x - (z - 2^(Bits-1))
// sum of x.
#pragma once

#include <type_traits>

#include "matmul/quantized/digits.h"
#include "matmul/quantized/packed_value.h"

namespace klfast {
namespace {

constexpr int kFewAtOnce = 4, kRowsAtOnce = 4;  // rows of x and of W

// At most kLanes consecutive lines of a row that meet at most kLanes groups, and the lanes' groups, counted from a
// block's first.
template <int Bits>
struct LaneGroups {
    struct Block {
        std::int64_t begin, end;  // lines
        std::int64_t group;
    };
    std::int64_t lines, blocks = 0;
    bool whole = true;              // whether no line belongs to two groups
    Buffer<std::int32_t> lane;      // [lines, kLanes]
    Buffer<std::int32_t> group_of;  // [lines + kLanes]: the groups of their first lanes, zeros behind them
    Buffer<Block> block;

    explicit LaneGroups(const DequantMatmulArgs& a)
        : lines((a.words() + kLanes - 1) / kLanes), lane(lines * kLanes), group_of(lines + kLanes), block(lines) {
        const std::int64_t words = larger(a.group / kWordValues<Bits>, 1), last = larger(a.groups() - 1, 0);
        std::int64_t group = 0, left = words;  // of the group; counting takes a tenth of the time of dividing
        for (std::int64_t line = 0; line < lines; ++line) {
            const std::int64_t ends = smaller(group + larger(kLanes - left + words - 1, 0) / words, last);
            if (blocks == 0 || ends - block[blocks - 1].group >= kLanes || line - block[blocks - 1].begin == kLanes)
                block[blocks++] = {.begin = line, .end = line, .group = group};
            block[blocks - 1].end = line + 1;
            whole = whole && ends == group;
            group_of[line] = static_cast<std::int32_t>(group - block[blocks - 1].group);
            for (int i = 0; i < kLanes; ++i) {
                lane[line * kLanes + i] = static_cast<std::int32_t>(group - block[blocks - 1].group);
                if (--left == 0) left = words, group = smaller(group + 1, last);
            }
        }
        for (int i = 0; i < kLanes; ++i) group_of[lines + i] = 0;
    }
};

template <template <int> class Lines, int Bits>
struct ExactFewRows {
    const DequantMatmulArgs& a;
    const LaneGroups<Bits> groups;
    const std::int64_t n_groups, row_bytes, whole;  // of W's rows; lines that they fill
    const std::int64_t pitch;                       // of a row of x
    Buffer<std::int32_t> x;                         // [m, lines, steps, kLanes], the bits of whatever Lines takes
    Buffer<float> unit;                             // [lines + kLanes], ones behind them, where lines have units
    Buffer<float> sums;    // [m, lines, kLanes]: sums of a word's values of x in the line's unit, for zero points
    Buffer<bool> has_nan;  // [m]: whether the row of x does, and so all of its results are NaNs
    const Lines<Bits> digits{};

    explicit ExactFewRows(const DequantMatmulArgs& args)
        : a(args),
          groups(args),
          n_groups(a.groups()),
          row_bytes(4 * a.stored_words()),
          whole(smaller(row_bytes / kLineBytes<Bits>, groups.lines)),
          pitch(groups.lines * Lines<Bits>::steps * kLanes),
          x(a.m * pitch),
          unit(Lines<Bits>::kUnits ? groups.lines + kLanes : 0),
          sums(a.zero_point ? a.m * groups.lines * kLanes : 0),
          has_nan(a.m) {
        constexpr int count = kWordValues<Bits>;
        Buffer<float> row(groups.lines * kLanes * count + kLanes);
        for (std::int64_t m = 0; m < a.m; ++m) {
            Vec nothing = set(0.0f);  // unless a value is infinite or a NaN
            for (std::int64_t k = 0; k < groups.lines * kLanes * count; k += kLanes) {
                const Vec v = k < a.k
                                  ? load(a.x, m * a.x_stride + k, a.x_type, static_cast<int>(smaller(kLanes, a.k - k)))
                                  : set(0.0f);
                store(row.data + k, v);
                nothing = fma(v, set(0.0f), nothing);
            }
            has_nan[m] = false;
            if (sum(nothing) != 0.0f)
                for (std::int64_t k = 0; k < a.k; ++k) has_nan[m] = has_nan[m] || row[k] != row[k];
            for (std::int64_t line = 0; line < groups.lines; ++line) {
                const float* const from = row.data + line * kLanes * count;
                const float u = digits.arrange(from, x.data + m * pitch + line * Lines<Bits>::steps * kLanes);
                if constexpr (Lines<Bits>::kUnits) unit[line] = u;
                if (!a.zero_point) continue;
                for (int i = 0; i < kLanes; ++i) {
                    float total = 0.0f;
                    for (int j = 0; j < count; ++j) total += from[i * count + j];
                    sums[(m * groups.lines + line) * kLanes + i] = total / u;
                }
            }
        }
        if constexpr (Lines<Bits>::kUnits)
            for (int i = 0; i < kLanes; ++i) unit[groups.lines + i] = 1.0f;
    }

    void run() const {
        const auto run_as = [&](auto zeros) {
            if (groups.whole)
                run<zeros.value, true>();
            else
                run<zeros.value, false>();
        };
        if (a.zero_point)
            run_as(std::true_type());
        else
            run_as(std::false_type());
    }

  private:
    // y[m .. m + M, n .. n + R]. Where W ends sooner, the last row before `end` is computed again in place of those
    // missing. Whole: each line has one group, so its scale comes from memory to all lanes at once; picking it lane by
    // lane takes one to three instructions more (docs/KERNEL_NOTES.md).
    template <bool Zeros, bool Whole, int R, int M>
    void tile(std::int64_t m, std::int64_t n, std::int64_t end) const {
        constexpr std::int64_t bytes = kLineBytes<Bits>;
        const std::uint8_t* row[R];
        unrolled<R>([&](int r) KLFAST_INLINE { row[r] = stored_row(a, smaller(n + r, end - 1)); });
        // In the order in which lines lie, not in that of their use: docs/KERNEL_NOTES.md.
        const std::uint8_t* ahead = row[0] + kAhead;
        const std::int64_t scale_size = size_of(a.scale_type);
        const char* const scales = static_cast<const char*>(a.scale) + rows_ahead(a) * n_groups * scale_size;
        const std::int32_t* line_x = x.data + m * pitch;
        const float* line_sums = sums.data + m * groups.lines * kLanes;
        Vec total[M][R];
        unrolled<M>([&](int i) KLFAST_INLINE { unrolled<R>([&](int r) KLFAST_INLINE { total[i][r] = set(0.0f); }); });
        for (std::int64_t b = 0; b < groups.blocks; ++b) {
            const auto block = groups.block[b];
            Vec scale[R], zero[R];
            unrolled<R>([&](int r) KLFAST_INLINE {
                const std::int64_t of = smaller(n + r, end - 1);
                __builtin_prefetch(scales + (of * n_groups + block.group) * scale_size, 0, 3);
                scale[r] = load_scales(a, n_groups, of, block.group);
                if constexpr (Zeros)
                    zero[r] = to_float(stored_zeros(a, of, block.group, smaller(kLanes, n_groups - block.group))) -
                              set(static_cast<float>(1 << (Bits - 1)));
            });
            alignas(64) float line_scale[R][kLanes];
            if constexpr (Whole) {
                const Ints group_of = read(groups.group_of.data + block.begin);
                unrolled<R>([&](int r) KLFAST_INLINE {
                    Vec s = pick(scale[r], group_of);
                    if constexpr (Lines<Bits>::kUnits) s = s * load(unit.data + block.begin);
                    store(line_scale[r], s);
                });
            }
            for (std::int64_t line = block.begin; line < block.end; ++line) {
                Ints word[R];
                unrolled<R>([&](int r) KLFAST_INLINE {
                    __builtin_prefetch(ahead, 0, 3);
                    ahead += bytes;
                    const std::uint8_t* const at = row[r] + line * bytes;
                    word[r] = line < whole ? read_line<Bits>(at) : read_line<Bits>(at, row_bytes - line * bytes);
                });
                Vec acc[M][R];
                unrolled<M>([&](int i)
                                KLFAST_INLINE { unrolled<R>([&](int r) KLFAST_INLINE { acc[i][r] = set(0.0f); }); });
                float u = 1.0f;
                if constexpr (Lines<Bits>::kUnits) u = unit[line];
                digits.template add<R, M>(word, line_x, pitch, u, acc);
                const Ints lane = read(groups.lane.data + line * kLanes);
                unrolled<R>([&](int r) KLFAST_INLINE {
                    Vec s;
                    if constexpr (Whole)
                        s = set(line_scale[r][line - block.begin]);
                    else if constexpr (Lines<Bits>::kUnits)
                        s = pick(scale[r], lane) * set(u);
                    else
                        s = pick(scale[r], lane);
                    unrolled<M>([&](int i) KLFAST_INLINE {
                        if constexpr (Zeros)
                            acc[i][r] = acc[i][r] - pick(zero[r], lane) * load(line_sums + i * groups.lines * kLanes);
                        total[i][r] = fma(acc[i][r], s, total[i][r]);
                    });
                });
                line_x += Lines<Bits>::steps * kLanes, line_sums += kLanes;
            }
        }
        unrolled<M>([&](int i) KLFAST_INLINE {
            unrolled<R>([&](int r) KLFAST_INLINE { finish(m + i, smaller(n + r, end - 1), sum(total[i][r])); });
        });
    }

    void finish(std::int64_t m, std::int64_t n, float y) const {
        if (y != y && !has_nan[m]) y = in_order(m, n);
        if (a.bias) y += load_float(a.bias, a.bias_from(m) + n, a.bias_type);
        if (a.y_type != a.rounded_to) y = rounded(y, a.rounded_to);
        store_float(a.y, m * a.n + n, a.y_type, y);
    }

    // One result value by value, a hundred times slower. Where x is infinite, parts of an integer or of its zero point
    // may give infinities of both signs, and so a NaN, though the whole has one sign.
    [[gnu::cold, gnu::noinline]] float in_order(std::int64_t m, std::int64_t n) const {
        const std::int32_t* const row = a.packed + n * a.stored_words();
        float total = 0.0f;
        for (std::int64_t k = 0; k < a.k; ++k) {
            const std::int64_t g = k / a.group;
            const std::int32_t q = value_at(row, k, 1, Bits);
            const std::int32_t z =
                a.zero_point ? value_at(a.zero_point + g, a.zero_row + n, n_groups, Bits) : 1 << (Bits - 1);
            total += load_float(a.x, m * a.x_stride + k, a.x_type) *
                     (static_cast<float>(q - z) * load_float(a.scale, n * n_groups + g, a.scale_type));
        }
        return total;
    }

    template <bool Zeros, bool Whole>
    void run() const {
        parallel_for(a.n, kRowsAtOnce, useful_threads(a, 1.0 * a.n * a.k), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t n = begin; n < end; n += kRowsAtOnce) rows<Zeros, Whole>(n, end);
        });
    }

    // All of x with rows n .. n + kRowsAtOnce of W, as many of them at a time as registers hold sums.
    template <bool Zeros, bool Whole>
    void rows(std::int64_t n, std::int64_t end) const {
        if constexpr (Lines<Bits>::kUnits) {
            tile<Zeros, Whole, kRowsAtOnce, 1>(0, n, end);
        } else {
            std::int64_t m = 0;
            for (; m + kFewAtOnce <= a.m; m += kFewAtOnce) wide<Zeros, Whole, kFewAtOnce>(m, n, end);
            switch (a.m - m) {
                case 3: return wide<Zeros, Whole, 3>(m, n, end);
                case 2: return tile<Zeros, Whole, kRowsAtOnce, 2>(m, n, end);
                case 1: return tile<Zeros, Whole, kRowsAtOnce, 1>(m, n, end);
            }
        }
    }

    template <bool Zeros, bool Whole, int M>
    void wide(std::int64_t m, std::int64_t n, std::int64_t end) const {
        constexpr int R = kRowsAtOnce / 2;
        for (std::int64_t first = n; first < smaller(n + kRowsAtOnce, end); first += R)
            tile<Zeros, Whole, R, M>(m, first, end);
    }
};

// Digits as floats, by digits.h's algebra.
template <int Bits>
struct FloatLines {
    using D = Digits<Bits>;
    static constexpr int steps = D::count;
    static constexpr bool kUnits = false;
    D digits;
    Vec zero[D::placed];

    FloatLines() { digits.zeros(set(static_cast<float>(1 << (Bits - 1))), zero); }

    float arrange(const float* x, std::int32_t* out) const {
        for (int i = 0; i < kLanes; ++i)
            for (int j = 0; j < steps; ++j)
                out[j * kLanes + i] = __builtin_bit_cast(std::int32_t, x[i * steps + j] * digits.power[j % D::placed]);
        return 1.0f;
    }

    template <int R, int M>
    [[gnu::always_inline]] void add(const Ints (&words)[R], const std::int32_t* x, std::int64_t x_pitch, float,
                                    Vec (&acc)[M][R]) const {
        Ints high[R];
        unrolled<R>([&](int r) KLFAST_INLINE { high[r] = shift_right(words[r], D::upper); });
        unrolled<steps>([&](int j) KLFAST_INLINE {
            unrolled<R>([&](int r) KLFAST_INLINE {
                const Vec value = digits.value(j < D::placed ? words[r] : high[r], j % D::placed, zero);
                unrolled<M>([&](int m) KLFAST_INLINE {
                    acc[m][r] = fma(value, float_bits(read(x + m * x_pitch + j * kLanes)), acc[m][r]);
                });
            });
        });
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
