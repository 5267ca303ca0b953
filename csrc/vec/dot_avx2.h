// Integer dot products beside vec/ints_avx2.h: AVX2's vpmaddubsw and vpmaddwd.
// Everything is local to the including translation unit, for its flags are its own.
//
// vpmaddubsw multiplies unsigned by signed bytes and adds pairs with saturation to int16:
//   int4: stored values are at most 15, a pair at most 2 * 15 * 127 = 3810, and two such are added before widening;
//   int8: stored values would saturate, so |q| and x sign(q) are multiplied: at most 2 * 128 * 127 = 32512. The sum is
//         that of q = stored - 128 (offset 128).
#pragma once

#include "vec/ints_avx2.h"

namespace klfast {
namespace {

template <int Bits>
struct DotOperand;

template <>
struct DotOperand<4> : Nibbles {
    static constexpr int offset = 0;
    using Nibbles::Nibbles;
};

template <>
struct DotOperand<8> {
    static constexpr int offset = 128;
    __m256i q, magnitude;
    explicit DotOperand(Ints word) : q(_mm256_xor_si256(word.v, _mm256_set1_epi8(-128))), magnitude(_mm256_abs_epi8(q)) {}
};

inline Ints widen_add(Ints sum, __m256i pairs) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}

inline Ints dot(Ints sum, const DotOperand<4>& w, const std::int32_t* x) {
    const __m256i even = _mm256_maddubs_epi16(w.even, _mm256_set1_epi32(x[0]));
    return widen_add(sum, _mm256_add_epi16(even, _mm256_maddubs_epi16(w.odd, _mm256_set1_epi32(x[1]))));
}

inline Ints dot(Ints sum, const DotOperand<8>& w, const std::int32_t* x) {
    return widen_add(sum, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(_mm256_set1_epi32(*x), w.q)));
}

}  // namespace
}  // namespace klfast
