// One int32 under the interface of ints_avx2.h and ints_avx512.h.
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstdint>

namespace klfast {
namespace {

struct Ints {
    std::int32_t v;
};

constexpr int kTileRows = 4, kDotRows = 4;

inline Ints set_int(std::int32_t a) { return {a}; }
inline Ints read(const std::int32_t* p) { return {*p}; }
inline Ints read(const std::int32_t* p, std::int64_t n) { return {n > 0 ? *p : 0}; }
inline void write(std::int32_t* p, Ints a) { *p = a.v; }
inline Ints operator&(Ints a, Ints b) { return {a.v & b.v}; }
inline Ints shift_right(Ints a, int bits) { return {static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v) >> bits)}; }
inline Vec to_float(Ints a) { return {static_cast<float>(a.v)}; }
inline Ints bits_of(Vec a) { return {__builtin_bit_cast(std::int32_t, a.v)}; }
inline Vec masked_float(Ints a, Ints mask, Ints base) { return {__builtin_bit_cast(float, (a.v & mask.v) | base.v)}; }
inline Vec float_bits(Ints a) { return {__builtin_bit_cast(float, a.v)}; }
// table[index], lane by lane
inline Vec pick(Vec table, Ints) { return table; }
inline void transpose(Ints (&)[1]) {}

template <int Bits>
struct DotOperand {
    static constexpr int offset = 0;
    std::uint32_t stored;
    explicit DotOperand(Ints word) : stored(static_cast<std::uint32_t>(word.v)) {}
};

inline std::int32_t byte_of(std::int32_t x, int i) { return static_cast<std::int8_t>(static_cast<std::uint32_t>(x) >> (8 * i)); }

inline Ints dot(Ints sum, const DotOperand<4>& w, const std::int32_t* x) {
    for (int j = 0; j < 8; ++j) sum.v += static_cast<std::int32_t>(w.stored >> (4 * j) & 0xf) * byte_of(x[j % 2], j / 2);
    return sum;
}

inline Ints dot(Ints sum, const DotOperand<8>& w, const std::int32_t* x) {
    for (int j = 0; j < 4; ++j) sum.v += static_cast<std::int32_t>(w.stored >> (8 * j) & 0xff) * byte_of(*x, j);
    return sum;
}

}  // namespace
}  // namespace klfast
