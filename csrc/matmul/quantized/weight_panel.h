// A panel: as many rows of W as a vector has lanes, one row a lane. Words, scales and zero points of Layout.PLAIN lie
// row by row and are transposed here on the way in; all else works on panels and never sees the layout.
// Included by the tiers only; local to the including translation unit.
#pragma once

#include <cstdint>

#include "matmul/quantized/dequant_matmul.h"
#include "gemm/common.h"
#include "gemm/segments.h"

namespace klfast {
namespace {

// Values in a word as kernels take it, and the bytes of a line, kLanes words of one row, in memory.
template <int Bits>
constexpr int kWordValues = Bits == 4 ? 8 : 4;
template <int Bits>
constexpr std::int64_t kLineBytes = kWordValues<Bits> * Bits / 8 * kLanes;

// Row n of W.
inline const std::uint8_t* stored_row(const DequantMatmulArgs& a, std::int64_t n) {
    return reinterpret_cast<const std::uint8_t*>(a.packed + n * a.stored_words());
}

// Rows that lie within kAhead bytes of W, and one more: how far ahead their scales are asked for.
inline std::int64_t rows_ahead(const DequantMatmulArgs& a) { return kAhead / larger(4 * a.stored_words(), 1) + 1; }

// A line; of int6 units, as read_six has them.
template <int Bits>
[[gnu::always_inline]] inline Ints read_line(const std::uint8_t* at) {
    if constexpr (Bits == 6)
        return read_six(at);
    else
        return read(reinterpret_cast<const std::int32_t*>(at));
}

// The same with zeros behind the `left` bytes that the row has from there (none for left <= 0).
template <int Bits>
inline Ints read_line(const std::uint8_t* at, std::int64_t left) {
    if (left >= kLineBytes<Bits>) return read_line<Bits>(at);
    if constexpr (Bits != 6) {
        return read(reinterpret_cast<const std::int32_t*>(at), left / 4);
    } else if constexpr (kLanes == 1) {
        std::uint8_t bytes[3] = {};
        for (std::int64_t i = 0; i < left; ++i) bytes[i] = at[i];
        return read_line<Bits>(bytes);
    } else {  // lines and rows begin where words do
        alignas(64) std::int32_t words[kLanes];
        write(words, read(reinterpret_cast<const std::int32_t*>(at), (left + 3) / 4));
        return read_line<Bits>(reinterpret_cast<const std::uint8_t*>(words));
    }
}

// A line of words as all kernels but ExactFewRows take them.
template <int Bits>
[[gnu::always_inline]] inline Ints as_words(Ints line) {
    if constexpr (Bits == 6)
        return six_to_bytes(line);
    else
        return line;
}

// Words of `count` columns from `first` on, rows n0.., as out[column * kLanes + lane]; zeros for rows behind the last.
// `out` has room for count rounded up to a multiple of kLanes. Asks for the same words of the rows `ahead` further on,
// or further where rows are short.
template <int Bits>
void load_words_as(const DequantMatmulArgs& a, std::int64_t n0, std::int64_t first, std::int64_t count,
                   std::int32_t* out, std::int64_t ahead) {
    constexpr std::int64_t kWordBytes = kLineBytes<Bits> / kLanes;
    const std::int64_t pitch = 4 * a.stored_words(), valid = smaller(kLanes, a.n - n0);
    const std::uint8_t* const base = stored_row(a, n0) + first * kWordBytes;
    const std::int64_t next = larger(ahead, rows_ahead(a)) * pitch;
    for (std::int64_t c = 0; c < count; c += kLanes) {
        Ints rows[kLanes];
        const std::int64_t left = smaller((count - c) * kWordBytes, pitch - (first + c) * kWordBytes);
        if (valid == kLanes && left >= kLineBytes<Bits>)
            for (int lane = 0; lane < kLanes; ++lane) {
                const std::uint8_t* const at = base + lane * pitch + c * kWordBytes;
                rows[lane] = as_words<Bits>(read_line<Bits>(at));
                __builtin_prefetch(at + next, 0, 2);
            }
        else
            for (int lane = 0; lane < kLanes; ++lane)
                rows[lane] = as_words<Bits>(read_line<Bits>(lane < valid ? base + lane * pitch + c * kWordBytes : base,
                                                            lane < valid ? left : 0));
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) write(out + (c + i) * kLanes, rows[i]);
    }
}

inline void load_words(const DequantMatmulArgs& a, std::int64_t n0, std::int64_t first, std::int64_t count,
                       std::int32_t* out, std::int64_t ahead = kLanes) {
    if (a.bits == 6)
        load_words_as<6>(a, n0, first, count, out, ahead);
    else
        load_words_as<8>(a, n0, first, count, out, ahead);  // a word is a word
}

// Zero points, as stored, of row n in `count` groups from g on.
inline Ints stored_zeros(const DequantMatmulArgs& a, std::int64_t n, std::int64_t g, std::int64_t count) {
    const std::int64_t bit = (a.zero_row + n) * a.bits, groups = a.groups();
    const int shift = static_cast<int>(bit % 32);
    const std::int32_t* const word = a.zero_point + bit / 32 * groups + g;
    Ints zeros = shift_right(read(word, count), shift);
    if (shift + a.bits > 32) zeros = zeros | shift_left(read(word + groups, count), 32 - shift);
    return zeros & set_int((1 << a.bits) - 1);
}

// Scales of row n from group g on, of `groups`. Lanes past the row's end hold the next row's: a full load is faster
// than a partial one.
inline Vec load_scales(const DequantMatmulArgs& a, std::int64_t groups, std::int64_t n, std::int64_t g) {
    const std::int64_t first = n * groups + g, left = a.n * groups - first;
    return load(a.scale, first, a.scale_type, static_cast<int>(smaller(kLanes, left)));
}

// Scales and zero points (as stored: q - q_min) of a panel as floats [group][lane].
struct PanelGrid {
    Buffer<float> scale, zero;

    explicit PanelGrid(const DequantMatmulArgs& a)
        : scale(round_up(a.groups(), kLanes) * kLanes), zero(round_up(a.groups(), kLanes) * kLanes) {
        const Vec middle = set(static_cast<float>(1 << (a.bits - 1)));
        if (a.zero_point == nullptr)
            for (std::int64_t g = 0; g < a.groups(); ++g) store(zero.data + g * kLanes, middle);
    }

    void load_panel(const DequantMatmulArgs& a, std::int64_t n0) {
        const std::int64_t groups = a.groups(), size = size_of(a.scale_type);
        const char* const ahead = static_cast<const char*>(a.scale) + rows_ahead(a) * groups * size;
        if (groups == 1 && a.zero_point == nullptr) {
            __builtin_prefetch(ahead + n0 * size, 0, 3);
            const std::int64_t first = smaller(n0, a.n - 1);  // of a pair of panels, the second may have no rows
            const auto count = static_cast<int>(smaller(kLanes, a.n - first));
            return store(scale.data, load(a.scale, first, a.scale_type, count));
        }
        const bool inside = (n0 + kLanes - 1) * groups + round_up(groups, kLanes) <= a.n * groups;  // no partial load
        for (std::int64_t g = 0; g < groups; g += kLanes) {
            Ints rows[kLanes];
            if (inside)
                unrolled<kLanes>([&](int lane) KLFAST_INLINE {
                    const std::int64_t first = (n0 + lane) * groups + g;
                    __builtin_prefetch(ahead + first * size, 0, 3);
                    rows[lane] = bits_of(load(a.scale, first, a.scale_type, kLanes));
                });
            else
                for (int lane = 0; lane < kLanes; ++lane)
                    rows[lane] = bits_of(load_scales(a, groups, smaller(n0 + lane, a.n - 1), g));
            transpose_to(rows, scale.data + g * kLanes);
            if (a.zero_point == nullptr) continue;
            for (int lane = 0; lane < kLanes; ++lane) {
                const std::int64_t n = smaller(n0 + lane, a.n - 1);
                rows[lane] = bits_of(to_float(stored_zeros(a, n, g, smaller(kLanes, groups - g))));
            }
            transpose_to(rows, zero.data + g * kLanes);
        }
    }

  private:
    static void transpose_to(Ints (&rows)[kLanes], float* out) {
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) write(reinterpret_cast<std::int32_t*>(out + i * kLanes), rows[i]);
    }
};

}  // namespace
}  // namespace klfast
