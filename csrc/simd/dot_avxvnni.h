// Integer dot products beside simd/ints_avx2.h.
//     AVX-VNNI  vpdpbusd on ymm: unsigned by signed bytes, four products added to an int32, without saturation
// Everything is local to the including translation unit, for its flags are its own.
//
// KLFAST_AVXVNNI_TWIN takes the same instruction in AVX-512's encoding, so that the tier can be tested on a machine
// that has AVX-512-VNNI but not AVX-VNNI (setup.py).
#pragma once

#include "simd/ints_avx2.h"

namespace klfast {
namespace {

constexpr int kDotRows = 6, kDotVectors = 2, kFewDotRows = 2;  // accumulators, of 16 registers

inline __m256i add_dot(__m256i sum, __m256i w, __m256i x) {
#ifdef KLFAST_AVXVNNI_TWIN
    return _mm256_dpbusd_epi32(sum, w, x);
#else
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#endif
}

// Quads of bytes, as stored, for dot products with quads of x; `offset` is what they lack.
template <int Bits>
struct DotOperand {
    static constexpr int quads = 1, offset = 0;
    __m256i stored;
    DotOperand() = default;
    explicit DotOperand(const Ints* quad) : stored(quad->v) {}
};

template <int Bits>
Ints dot(Ints sum, const DotOperand<Bits>& w, const Ints* x) {
    return {add_dot(sum.v, w.stored, x->v)};
}

#define KLFAST_DOT_PLANES
constexpr int kTopPlane = 1;

// For plane_lines.h: 2^15, 2^7 and 1 times the products with three pairs of quads of x, and the vector behind these.
inline Ints dot_planes(const Nibbles& w, const std::int32_t* x) {
    const auto plane = [&](__m256i sum, int i) {
        return add_dot(add_dot(sum, w.even.v, read(x + 16 * i).v), w.odd.v, read(x + 16 * i + 8).v);
    };
    const __m256i top = _mm256_slli_epi32(plane(_mm256_setzero_si256(), 0), 8);
    return {plane(_mm256_add_epi32(_mm256_slli_epi32(plane(top, 1), 7), read(x + 48).v), 2)};
}

}  // namespace
}  // namespace klfast
