// Eight floats in a ymm register; the same interface as simd/floats_scalar.h.
//     AVX   vaddps, vsubps, vmulps, vdivps, vminps, vmaxps, vroundps; vandps, vorps for signs; vcmpps and vblendvps
//     FMA   vfmadd
//     F16C  vcvtph2ps, vcvtps2ph
//     AVX2  bf16 by integers: vpmovzxwd and vpslld to float; vpaddd, vpsrld, vpackusdw and vpermq from it
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "core/dtype.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own intrinsics' undefined operands
#endif

namespace klfast {
namespace {

struct Vec {
    static constexpr int width = 8;
    __m256 v;
};

constexpr int kLanes = Vec::width;

inline Vec set(float a) { return {_mm256_set1_ps(a)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(b.v, a.v)}; }  // a NaN in a passes, as in max
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(b.v, a.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec negative_abs(Vec a) { return {_mm256_or_ps(a.v, _mm256_set1_ps(-0.0f))}; }
// For size >= 0.
inline Vec copysign(Vec size, Vec sign) { return {_mm256_or_ps(size.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))}; }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec quotient(Vec a, Vec b) { return a / b; }
inline Vec wide_quotient(Vec a, Vec b) { return a / b; }

inline float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// What exp2 takes, and its scale, for an integral n within these bounds: -127 gives 0, 128 infinity.
inline Vec within_exponents(Vec x) { return min(max(x, set(-127.0f)), set(128.0f)); }
inline Vec scale_within(Vec p, Vec n) {
    const __m256i e = _mm256_cvtps_epi32(n.v);
    return {
        _mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)))};
}

// p * 2^n for an integral n; n < -126 gives 0, n > 127 infinity.
inline Vec scale(Vec p, Vec n) { return scale_within(p, within_exponents(n)); }

// `n` elements of type t from index i on, the other lanes zero.
inline Vec load(const void* p, std::int64_t i, DType t, int n) {
    if (t == DType::f32) {
        const float* q = static_cast<const float*>(p) + i;
        if (n == kLanes) return load(q);
        float part[kLanes] = {};
        std::memcpy(part, q, n * sizeof(float));
        return load(part);
    }
    const std::uint16_t* q = static_cast<const std::uint16_t*>(p) + i;
    std::uint16_t part[kLanes] = {};
    if (n != kLanes) q = static_cast<const std::uint16_t*>(std::memcpy(part, q, n * sizeof(std::uint16_t)));
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    if (t == DType::f16) return {_mm256_cvtph_ps(raw)};
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16))};
}

inline void store(void* p, std::int64_t i, DType t, int n, Vec a) {
    if (t == DType::f32) {
        float* q = static_cast<float*>(p) + i;
        if (n == kLanes) return store(q, a);
        float part[kLanes];
        store(part, a);
        std::memcpy(q, part, n * sizeof(float));
        return;
    }
    __m128i raw;
    if (t == DType::f16) {
        raw = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
    } else {  // round to nearest even by integers; a NaN keeps its upper bits and is made quiet
        const __m256i u = _mm256_castps_si256(a.v),
                      odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
        const __m256i high = _mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
        const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(high, 16), _mm256_setzero_si256());
        raw = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b00001000));
    }
    std::uint16_t* q = static_cast<std::uint16_t*>(p) + i;
    if (n == kLanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(q), raw);
    std::uint16_t part[kLanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(part), raw);
    std::memcpy(q, part, n * sizeof(std::uint16_t));
}

}  // namespace
}  // namespace klfast

#include "simd/math.h"
