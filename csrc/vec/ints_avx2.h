// Eight int32 in a ymm register, beside vec/avx2.h: AVX2 shifts, shuffles, vpmaddubsw and vpmaddwd.
// Everything is local to the including translation unit, for its flags are its own.
//
// The integer dot product. vpmaddubsw multiplies unsigned by signed bytes and adds pairs with saturation to int16:
//   int4: stored values are at most 15, a pair at most 2 * 15 * 127 = 3810, and two such are added before widening;
//   int8: stored values would saturate, so |q| and x sign(q) are multiplied: at most 2 * 128 * 127 = 32512. The sum is
//         that of q = stored - 128 (offset 128).
#pragma once

#include <cstdint>

#include <immintrin.h>

namespace klfast {
namespace {

struct Ints {
    __m256i v;
};

constexpr int kTileRows = 6, kDotRows = 4;

inline Ints set_int(std::int32_t a) { return {_mm256_set1_epi32(a)}; }
inline Ints read(const std::int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
// The first n values, zeros behind them (all zeros for n <= 0).
inline Ints read(const std::int32_t* p, std::int64_t n) {
    if (n >= 8) return read(p);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_maskload_epi32(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane))};
}
inline void write(std::int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
inline Ints shift_right(Ints a, int bits) { return {_mm256_srl_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
inline Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vec float_bits(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
inline Vec pick(Vec table, Ints index) { return {_mm256_permutevar8x32_ps(table.v, index.v)}; }
inline Ints bits_of(Vec a) { return {_mm256_castps_si256(a.v)}; }
// The float whose bits are (a & mask) | base.
inline Vec masked_float(Ints a, Ints mask, Ints base) {
    return {_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(a.v, mask.v), base.v))};
}

inline void transpose(Ints (&r)[8]) {
    __m256i pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(r[i].v, r[i + 1].v);
        pairs[i + 1] = _mm256_unpackhi_epi32(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + 2 + j]);
            quads[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + 2 + j]);
        }
    for (int j = 0; j < 4; ++j) {
        r[j].v = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x20);
        r[4 + j].v = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x31);
    }
}

template <int Bits>
struct DotOperand;

template <>
struct DotOperand<4> {
    static constexpr int offset = 0;
    __m256i even, odd;
    explicit DotOperand(Ints word) {
        const __m256i low = _mm256_set1_epi8(0xf);
        even = _mm256_and_si256(word.v, low);
        odd = _mm256_and_si256(_mm256_srli_epi16(word.v, 4), low);
    }
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
