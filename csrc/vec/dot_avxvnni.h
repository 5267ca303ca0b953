// Integer dot products beside vec/ints_avx2.h: vpdpbusd on ymm registers (unsigned by signed bytes, four products added to
// an int32, without saturation). Everything is local to the including translation unit, for its flags are its own.
//
// KLFAST_AVXVNNI_TWIN takes the same instruction in AVX-512's encoding, so that the tier can be tested on a machine
// that has AVX-512-VNNI but not AVX-VNNI (setup.py).
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
    static constexpr int offset = 0;
    __m256i stored;
    explicit DotOperand(Ints word) : stored(word.v) {}
};

inline __m256i dot_bytes(__m256i sum, __m256i w, std::int32_t x) {
#ifdef KLFAST_AVXVNNI_TWIN
    return _mm256_dpbusd_epi32(sum, w, _mm256_set1_epi32(x));
#else
    return _mm256_dpbusd_avx_epi32(sum, w, _mm256_set1_epi32(x));
#endif
}

inline Ints dot(Ints sum, const DotOperand<4>& w, const std::int32_t* x) { return {dot_bytes(dot_bytes(sum.v, w.even, x[0]), w.odd, x[1])}; }
inline Ints dot(Ints sum, const DotOperand<8>& w, const std::int32_t* x) { return {dot_bytes(sum.v, w.stored, *x)}; }

}  // namespace
}  // namespace klfast
