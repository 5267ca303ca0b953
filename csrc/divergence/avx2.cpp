// AVX2: 8 floats. VFMADD231PS, VDIVPS, VROUNDPS, VBLENDVPS; halves widened by VCVTPH2PS and VPMOVZXWD.
#include <immintrin.h>

#include "divergence/divergence.h"

#define KLFAST_TIER avx2

namespace klfast::avx2 {
namespace {

using F = __m256;
constexpr int kWidth = 8;

inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F splat(float s) { return _mm256_set1_ps(s); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline __m256i mask(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline F load_n(const float* p, int n, float fill) {
    return _mm256_blendv_ps(splat(fill), _mm256_maskload_ps(p, mask(n)), _mm256_castsi256_ps(mask(n)));
}
inline F lanes(int n) { return _mm256_and_ps(_mm256_castsi256_ps(mask(n)), splat(1.0f)); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F v) { return _mm256_andnot_ps(splat(-0.0f), v); }
inline F copysign(F size, F sign) { return _mm256_or_ps(size, _mm256_and_ps(sign, splat(-0.0f))); }
inline F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale(F v, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline F less(F u, F v, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(u, v, _CMP_LT_OQ)); }

}  // namespace
}  // namespace klfast::avx2

#include "divergence/sums.h"

namespace klfast::avx2 {
namespace {
void widen(const void* from, DType dtype, int n, float* to) {
    const auto* halves = static_cast<const std::uint16_t*>(from);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
        store(to + i, dtype == DType::f16 ? _mm256_cvtph_ps(v) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)));
    }
    for (; i < n; ++i) {
        const __m128i v = _mm_cvtsi32_si128(halves[i]);
        to[i] = dtype == DType::f16 ? _mm_cvtss_f32(_mm_cvtph_ps(v)) : _mm_cvtss_f32(_mm_castsi128_ps(_mm_slli_epi32(v, 16)));
    }
}
}  // namespace
const divergence::Kernels kDivergence{scan, sums, moments, widen};
}  // namespace klfast::avx2
