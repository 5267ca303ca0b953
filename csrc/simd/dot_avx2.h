// Integer dot products beside simd/ints_avx2.h.
//     AVX2  vpmaddubsw  unsigned by signed bytes, pairs added to int16 with saturation
//           vpmaddwd    by ones: pairs of int16 added to int32
//           vpabsb, vpsignb  |q| and x sign(q)
// Everything is local to the including translation unit, for its flags are its own.
//
// Nothing may saturate:
//   int4: stored values are at most 15, a pair at most 2 * 15 * 127 = 3810, and two such are added before widening;
//   int6: at most 63, a pair at most 2 * 63 * 127 = 16002;
//   int8: stored values would, so |q| and x sign(q) are multiplied: at most 2 * 128 * 127 = 32512. The sum is that of
//         q = stored - 128 (offset 128).
#pragma once

#include "simd/ints_avx2.h"

namespace klfast {
namespace {

constexpr int kDotRows = 4, kDotVectors = 2, kFewDotRows = 2;  // accumulators, of 16 registers

inline Ints widen_add(Ints sum, __m256i pairs) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

// Quads of bytes for dot products with quads of x; `offset` is what they lack.
template <int Bits>
struct DotOperand;

template <>
struct DotOperand<4> {
    static constexpr int quads = 2, offset = 0;
    __m256i first, second;
    DotOperand() = default;
    explicit DotOperand(const Ints* quad) : first(quad[0].v), second(quad[1].v) {}
};

inline Ints dot(Ints sum, const DotOperand<4>& w, const Ints* x) {
    return widen_add(sum,
                     _mm256_add_epi16(_mm256_maddubs_epi16(w.first, x[0].v), _mm256_maddubs_epi16(w.second, x[1].v)));
}

#define KLFAST_DOT_PLANES
constexpr int kTopPlane = -1;  // -2^15 is an int16, 2^15 is none

// For plane_lines.h: -2^15, 2^7 and 1 times the products with three pairs of quads of x, and the vector behind these.
// Pairs are at most 2 * 15 * 128 = 3840, two such are added, and the factors are int16.
inline Ints dot_planes(const Nibbles& w, const std::int32_t* x) {
    const auto plane = [&](int i, std::int16_t factor) {
        const __m256i even = _mm256_maddubs_epi16(w.even.v, read(x + 16 * i).v),
                      odd = _mm256_maddubs_epi16(w.odd.v, read(x + 16 * i + 8).v);
        return _mm256_madd_epi16(_mm256_add_epi16(even, odd), _mm256_set1_epi16(factor));
    };
    return {_mm256_add_epi32(_mm256_add_epi32(plane(0, -0x8000), plane(1, 0x80)),
                             _mm256_add_epi32(plane(2, 1), read(x + 48).v))};
}

template <>
struct DotOperand<6> {
    static constexpr int quads = 1, offset = 0;
    __m256i stored;
    DotOperand() = default;
    explicit DotOperand(const Ints* quad) : stored(quad->v) {}
};

inline Ints dot(Ints sum, const DotOperand<6>& w, const Ints* x) {
    return widen_add(sum, _mm256_maddubs_epi16(w.stored, x->v));
}

template <>
struct DotOperand<8> {
    static constexpr int quads = 1, offset = 128;
    __m256i q, magnitude;
    DotOperand() = default;
    explicit DotOperand(const Ints* quad)
        : q(_mm256_xor_si256(quad->v, _mm256_set1_epi8(-128))), magnitude(_mm256_abs_epi8(q)) {}
};

inline Ints dot(Ints sum, const DotOperand<8>& w, const Ints* x) {
    return widen_add(sum, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x->v, w.q)));
}

}  // namespace
}  // namespace klfast
