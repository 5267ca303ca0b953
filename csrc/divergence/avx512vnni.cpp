// AVX-512 F, BW, DQ: 16 floats. VFMADD231PS, VDIVPS, VRNDSCALEPS, VSCALEFPS and masks; halves widened by VCVTPH2PS and
// VPMOVZXWD. (The tier's VNNI serves other ops.)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own AVX-512 header
#include <immintrin.h>

#include "divergence/divergence.h"

#define KLFAST_TIER avx512vnni

namespace klfast::avx512vnni {
namespace {

using F = __m512;
constexpr int kWidth = 16;

inline __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F splat(float s) { return _mm512_set1_ps(s); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F load_n(const float* p, int n, float fill) { return _mm512_mask_loadu_ps(splat(fill), mask(n), p); }
inline F lanes(int n) { return _mm512_maskz_mov_ps(mask(n), splat(1.0f)); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F v) { return _mm512_abs_ps(v); }
inline F copysign(F size, F sign) { return _mm512_or_ps(size, _mm512_and_ps(sign, splat(-0.0f))); }
inline F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale(F v, F n) { return _mm512_scalef_ps(v, n); }
inline F less(F u, F v, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(u, v, _CMP_LT_OQ), no, yes); }

}  // namespace
}  // namespace klfast::avx512vnni

#include "divergence/sums.h"

namespace klfast::avx512vnni {
namespace {
void widen(const void* from, DType dtype, int n, float* to) {
    const auto* halves = static_cast<const std::uint16_t*>(from);
    for (int i = 0; i < n; i += 16) {
        const __mmask16 valid = n - i < 16 ? mask(n - i) : static_cast<__mmask16>(0xffff);
        const __m256i v = _mm256_maskz_loadu_epi16(valid, halves + i);
        const F wide = dtype == DType::f16 ? _mm512_cvtph_ps(v) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
        _mm512_mask_storeu_ps(to + i, valid, wide);
    }
}
}  // namespace
const divergence::Kernels kDivergence{scan, sums, moments, widen};
}  // namespace klfast::avx512vnni
