// Eight int32 in a ymm register, beside simd/floats_avx2.h.
//     AVX2  vpand, vpsrld; vpmaskmovd for parts of a vector; vpermps to look up; vphaddd for sums;
//           vpunpck and vperm2i128 to transpose; vpshufb, vpblendw for values of six bits
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include <immintrin.h>

namespace klfast {
namespace {

struct Ints {
    __m256i v;
};

constexpr int kTileRows = 6, kPanelSums = 4;

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
inline Ints shift_left(Ints a, int bits) { return {_mm256_sll_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
inline Ints operator|(Ints a, Ints b) { return {_mm256_or_si256(a.v, b.v)}; }
// Eight units of three bytes, in which four values of six bits lie, each in the lower 24 bits of its lane: two loads
// that read these 24 bytes and no other, and vpshufb.
inline Ints read_six(const std::uint8_t* p) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                  high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
    const __m256i lanes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, 4, 5, 6, -1, 7, 8, 9,
                                           -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return {_mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), lanes)};
}
// The values of such units, a byte each: two go to the upper half of a lane, then one of each half to its upper byte.
inline Ints six_to_bytes(Ints unit) {
    const __m256i pairs = _mm256_blend_epi16(unit.v, _mm256_slli_epi32(unit.v, 4), 0xaa);
    return {_mm256_or_si256(_mm256_and_si256(pairs, _mm256_set1_epi16(0x003f)),
                            _mm256_and_si256(_mm256_slli_epi16(pairs, 2), _mm256_set1_epi16(0x3f00)))};
}
inline Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vec float_bits(Ints a) { return {_mm256_castsi256_ps(a.v)}; }
inline Vec pick(Vec table, Ints index) { return {_mm256_permutevar8x32_ps(table.v, index.v)}; }
inline Ints bits_of(Vec a) { return {_mm256_castps_si256(a.v)}; }
// The float whose bits are (a & mask) | base.
inline Vec masked_float(Ints a, Ints mask, Ints base) {
    return {_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(a.v, mask.v), base.v))};
}

// The lower and the upper nibbles of a word's bytes.
struct Nibbles {
    Ints even, odd;
    explicit Nibbles(Ints word) {
        const __m256i low = _mm256_set1_epi8(0xf);
        even.v = _mm256_and_si256(word.v, low);
        odd.v = _mm256_and_si256(_mm256_srli_epi16(word.v, 4), low);
    }
};

constexpr int kFoldRows = 4;

// Four lanes each: those of row i in lane i of each run of four.
inline Ints fold(const Ints (&row)[kFoldRows]) {
    return {_mm256_hadd_epi32(_mm256_hadd_epi32(row[0].v, row[1].v), _mm256_hadd_epi32(row[2].v, row[3].v))};
}

// Of eight rows, four a vector as `fold` has them: sums of 8 / Segments lanes each, one vector a segment, one row a
// lane.
template <int Segments>
void sums_of_rows(const std::int32_t* folded, Ints (&sum)[Segments]) {
    const __m256i p0 = read(folded).v, p1 = read(folded + 8).v;
    const __m256i low = _mm256_permute2x128_si256(p0, p1, 0x20), high = _mm256_permute2x128_si256(p0, p1, 0x31);
    if constexpr (Segments == 2)
        sum[0].v = low, sum[1].v = high;
    else
        sum[0].v = _mm256_add_epi32(low, high);
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

}  // namespace
}  // namespace klfast
