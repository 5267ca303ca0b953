// One int32 under the interface of simd/ints_avx2.h and simd/ints_avx512.h.
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace klfast {
namespace {

struct Ints {
    std::int32_t v;
};

constexpr int kTileRows = 4, kPanelSums = 4, kDotRows = 4, kDotVectors = 1, kFewDotRows = 4;

inline Ints set_int(std::int32_t a) { return {a}; }
inline Ints read(const std::int32_t* p) { return {*p}; }
inline Ints read(const std::int32_t* p, std::int64_t n) { return {n > 0 ? *p : 0}; }
inline void write(std::int32_t* p, Ints a) { *p = a.v; }
inline Ints operator&(Ints a, Ints b) { return {a.v & b.v}; }
inline Ints shift_right(Ints a, int bits) {
    return {static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v) >> bits)};
}
inline Ints shift_left(Ints a, int bits) {
    return {static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v) << bits)};
}
inline Ints operator|(Ints a, Ints b) { return {a.v | b.v}; }
// Units of three bytes, in which four values of six bits lie, each in the lower 24 bits of its lane.
inline Ints read_six(const std::uint8_t* p) { return {p[0] | p[1] << 8 | p[2] << 16}; }
// The values of such a unit, a byte each.
inline Ints six_to_bytes(Ints unit) {
    return {(unit.v & 0x3f) | (unit.v & 0xfc0) << 2 | (unit.v & 0x3f000) << 4 | (unit.v & 0xfc0000) << 6};
}
inline Vec to_float(Ints a) { return {static_cast<float>(a.v)}; }
inline Ints bits_of(Vec a) { return {__builtin_bit_cast(std::int32_t, a.v)}; }
inline Vec masked_float(Ints a, Ints mask, Ints base) { return {__builtin_bit_cast(float, (a.v & mask.v) | base.v)}; }
inline Vec float_bits(Ints a) { return {__builtin_bit_cast(float, a.v)}; }
// table[index], lane by lane
inline Vec pick(Vec table, Ints) { return table; }
inline void transpose(Ints (&)[1]) {}

// The lower and the upper nibbles of a word's bytes.
struct Nibbles {
    Ints even, odd;
    explicit Nibbles(Ints word) : even{word.v & 0x0f0f0f0f}, odd{shift_right(word, 4).v & 0x0f0f0f0f} {}
};

// Quads of bytes, as stored, for dot products with quads of x; `offset` is what they lack.
template <int Bits>
struct DotOperand {
    static constexpr int quads = 1, offset = 0;
    std::int32_t stored;
    DotOperand() = default;
    explicit DotOperand(const Ints* quad) : stored(quad->v) {}
};

template <int Bits>
Ints dot(Ints sum, const DotOperand<Bits>& w, const Ints* x) {
    for (int i = 0; i < 4; ++i) {
        const auto byte = [i](std::int32_t quad) {
            return static_cast<std::uint8_t>(static_cast<std::uint32_t>(quad) >> (8 * i));
        };
        sum.v += byte(w.stored) * static_cast<std::int8_t>(byte(x->v));
    }
    return sum;
}

constexpr int kFoldRows = 1;

inline Ints fold(const Ints (&row)[kFoldRows]) { return row[0]; }

template <int Segments>
void sums_of_rows(const std::int32_t* folded, Ints (&sum)[Segments]) {
    sum[0] = read(folded);
}

}  // namespace
}  // namespace klfast
