// Sixteen int32 in a zmm register, beside simd/floats_avx512.h.
//     F     vpandd, vpsrld; vmovdqu32 with a mask for parts of a vector; vpermps to look up;
//           vpternlogd for (a & b) | c; vpunpck and vshufi32x4 to transpose
//     BW    vpsrlw for nibbles; vpshufb, vpblendmw, vpblendmb for values of six bits, with vpermd
//     VNNI  vpdpbusd: unsigned by signed bytes, four products added to an int32, without saturation
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include <immintrin.h>

namespace klfast {
namespace {

struct Ints {
    __m512i v;
};

// Accumulators: 14 x 2 of 32 registers for floats, 6 x 4 for integers.
constexpr int kTileRows = 14, kPanelSums = 8, kDotRows = 6, kDotVectors = 4, kFewDotRows = 4;

inline Ints set_int(std::int32_t a) { return {_mm512_set1_epi32(a)}; }
inline Ints read(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
// The first n values, zeros behind them (all zeros for n <= 0).
inline Ints read(const std::int32_t* p, std::int64_t n) {
    const auto mask = static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0);
    return {_mm512_maskz_loadu_epi32(mask, p)};
}
inline void write(std::int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints shift_right(Ints a, int bits) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
inline Ints shift_left(Ints a, int bits) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
// Sixteen units of three bytes, in which four values of six bits lie, each in the lower 24 bits of its lane: two loads
// that read these 48 bytes and no other, vpermd and vpshufb. (A masked load takes twice the time on Zen 5.)
inline Ints read_six(const std::uint8_t* p) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
                  words = _mm512_inserti64x2(low, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32)), 2),
                  fours = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11),
                  lanes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
    return {_mm512_shuffle_epi8(_mm512_permutexvar_epi32(fours, words), lanes)};
}
// The values of such units, a byte each: two go to the upper half of a lane, then one of each half to its upper byte.
inline Ints six_to_bytes(Ints unit) {
    const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, unit.v, _mm512_slli_epi32(unit.v, 4));
    return {_mm512_and_si512(_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, pairs, _mm512_slli_epi32(pairs, 2)),
                             _mm512_set1_epi8(0x3f))};
}
inline Vec to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vec float_bits(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
inline Vec pick(Vec table, Ints index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }
inline Ints bits_of(Vec a) { return {_mm512_castps_si512(a.v)}; }
// The float whose bits are (a & mask) | base.
inline Vec masked_float(Ints a, Ints mask, Ints base) {
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(a.v, mask.v, base.v, 0xea))};
}

inline void transpose(Ints (&r)[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of rows
        a[i] = _mm512_unpacklo_epi32(r[i].v, r[i + 1].v);
        a[i + 1] = _mm512_unpackhi_epi32(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4)  // b[i + c], 128-bit lane l: column 4 l + c of rows i .. i + 3
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
        }
    for (int c = 0; c < 4; ++c) {  // gather lane l of the four quads
        const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x44),
                      high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x44),
                      high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xee);
        r[c].v = _mm512_shuffle_i32x4(low01, low23, 0x88);
        r[4 + c].v = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        r[8 + c].v = _mm512_shuffle_i32x4(high01, high23, 0x88);
        r[12 + c].v = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
}

// The lower and the upper nibbles of a word's bytes.
struct Nibbles {
    Ints even, odd;
    explicit Nibbles(Ints word) {
        const __m512i low = _mm512_set1_epi8(0xf);
        even.v = _mm512_and_si512(word.v, low);
        odd.v = _mm512_and_si512(_mm512_srli_epi16(word.v, 4), low);
    }
};

// Quads of bytes, as stored, for dot products with quads of x; `offset` is what they lack.
template <int Bits>
struct DotOperand {
    static constexpr int quads = 1, offset = 0;
    __m512i stored;
    DotOperand() = default;
    explicit DotOperand(const Ints* quad) : stored(quad->v) {}
};

template <int Bits>
Ints dot(Ints sum, const DotOperand<Bits>& w, const Ints* x) {
    return {_mm512_dpbusd_epi32(sum.v, w.stored, x->v)};
}

#define KLFAST_DOT_PLANES
constexpr int kTopPlane = 1;

// For plane_lines.h: 2^15, 2^7 and 1 times the products with three pairs of quads of x, and the vector behind these.
inline Ints dot_planes(const Nibbles& w, const std::int32_t* x) {
    const auto plane = [&](__m512i sum, int i) {
        return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, w.even.v, read(x + 32 * i).v), w.odd.v,
                                   read(x + 32 * i + 16).v);
    };
    const __m512i top = _mm512_slli_epi32(plane(_mm512_setzero_si512(), 0), 8);
    return {plane(_mm512_add_epi32(_mm512_slli_epi32(plane(top, 1), 7), read(x + 96).v), 2)};
}

constexpr int kFoldRows = 4;

// Four lanes each: those of row i in lane i of each run of four.
inline Ints fold(const Ints (&row)[kFoldRows]) {
    const auto halves = [](__m512i a, __m512i b) {  // a0 + a1, a2 + a3, b0 + b1, b2 + b3
        const __m512 x = _mm512_castsi512_ps(a), y = _mm512_castsi512_ps(b);
        return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88)),
                                _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd)));
    };
    return {halves(halves(row[0].v, row[1].v), halves(row[2].v, row[3].v))};
}

// Of sixteen rows, four a vector as `fold` has them: sums of 16 / Segments lanes each, one vector a segment, one row a
// lane.
template <int Segments>
void sums_of_rows(const std::int32_t* folded, Ints (&sum)[Segments]) {
    const __m512i p0 = read(folded).v, p1 = read(folded + 16).v, p2 = read(folded + 32).v, p3 = read(folded + 48).v;
    if constexpr (Segments == 4) {
        const __m512i a = _mm512_shuffle_i32x4(p0, p1, 0x44), b = _mm512_shuffle_i32x4(p0, p1, 0xee);
        const __m512i c = _mm512_shuffle_i32x4(p2, p3, 0x44), d = _mm512_shuffle_i32x4(p2, p3, 0xee);
        sum[0].v = _mm512_shuffle_i32x4(a, c, 0x88), sum[1].v = _mm512_shuffle_i32x4(a, c, 0xdd);
        sum[2].v = _mm512_shuffle_i32x4(b, d, 0x88), sum[3].v = _mm512_shuffle_i32x4(b, d, 0xdd);
    } else {
        const auto halves = [](__m512i x, __m512i y) {
            return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
        };
        const __m512i a = halves(p0, p1), b = halves(p2, p3);
        if constexpr (Segments == 2)
            sum[0].v = _mm512_shuffle_i32x4(a, b, 0x88), sum[1].v = _mm512_shuffle_i32x4(a, b, 0xdd);
        else
            sum[0].v = halves(a, b);
    }
}

}  // namespace
}  // namespace klfast
