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
#ifdef KLFAST_AVXVNNI_TWIN
    return {_mm256_dpbusd_epi32(sum.v, w.stored, x->v)};
#else
    return {_mm256_dpbusd_avx_epi32(sum.v, w.stored, x->v)};
#endif
}

}  // namespace
}  // namespace klfast
