// Sixteen floats in a zmm register; the same interface as simd/floats_scalar.h.
//     F       vaddps, vsubps, vmulps, vdivps, vminps, vmaxps, vrndscaleps, vfmadd; vscalefps for powers of two;
//             vrcp14ps and a Newton step for quotients; vcvtph2ps, vcvtps2ph; masks for parts of a vector and choices
//     DQ      vandps, vorps for signs
//     BW, VL  vmovdqu16 on ymm with a mask, for parts of a vector of 16-bit floats
//     BF16    vcvtneps2bf16 in tiers that have it, else integers as in simd/floats_avx2.h
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstdint>

#include <immintrin.h>

#include "core/dtype.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own intrinsics' undefined operands
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace klfast {
namespace {

struct Vec {
    static constexpr int width = 16;
    __m512 v;
};

constexpr int kLanes = Vec::width;

inline Vec set(float a) { return {_mm512_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(b.v, a.v)}; }  // a NaN in a passes, as in max
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(b.v, a.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec negative_abs(Vec a) { return {_mm512_or_ps(a.v, _mm512_set1_ps(-0.0f))}; }
// For size >= 0.
inline Vec copysign(Vec size, Vec sign) { return {_mm512_or_ps(size.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))}; }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }

// p * 2^n for an integral n.
inline Vec scale(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }

// What exp2 takes, and its scale: the instruction makes 0 or infinity of n = -inf or inf, even where p is a NaN.
inline Vec within_exponents(Vec x) { return x; }
inline Vec scale_within(Vec p, Vec n) { return scale(p, n); }

// a / b for 1 <= b < 2^126: the 14-bit reciprocal and one Newton step, within 2 ulp.
inline Vec quotient(Vec a, Vec b) {
    const __m512 r = _mm512_rcp14_ps(b.v), e = _mm512_fnmadd_ps(b.v, r, _mm512_set1_ps(1.0f));
    return {_mm512_mul_ps(a.v, _mm512_fmadd_ps(r, e, r))};
}

// The same for 1 <= b <= infinity.
inline Vec wide_quotient(Vec a, Vec b) {
    const __m512 r = _mm512_rcp14_ps(b.v), e = _mm512_fnmadd_ps(b.v, r, _mm512_set1_ps(1.0f));
    const __mmask16 finite = _mm512_cmp_ps_mask(b.v, _mm512_set1_ps(__builtin_inff()), _CMP_NEQ_UQ);
    return {_mm512_mul_ps(a.v, _mm512_maskz_fmadd_ps(finite, r, e, r))};
}

inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

// `n` elements of type t from index i on, the other lanes zero.
inline Vec load(const void* p, std::int64_t i, DType t, int n) {
    if (t == DType::f32) return {_mm512_maskz_loadu_ps(first(n), static_cast<const float*>(p) + i)};
    const __m256i raw = _mm256_maskz_loadu_epi16(first(n), static_cast<const std::uint16_t*>(p) + i);
    if (t == DType::f16) return {_mm512_cvtph_ps(raw)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}

inline void store(void* p, std::int64_t i, DType t, int n, Vec a) {
    if (t == DType::f32) return _mm512_mask_storeu_ps(static_cast<float*>(p) + i, first(n), a.v);
    __m256i raw;
    if (t == DType::f16) {
        raw = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
    } else {
#ifdef __AVX512BF16__
        raw = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));  // subnormal numbers become 0
#else
        // round to nearest even by integers; a NaN keeps its upper bits and is made quiet
        const __m512i u = _mm512_castps_si512(a.v),
                      odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
        raw = _mm512_cvtepi32_epi16(
            _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000)), 16));
#endif
    }
    _mm256_mask_storeu_epi16(static_cast<std::uint16_t*>(p) + i, first(n), raw);
}

}  // namespace
}  // namespace klfast

#include "simd/math.h"
