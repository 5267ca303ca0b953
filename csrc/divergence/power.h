// Powers of 2 for the weights of vector_loops.h, over the Vec of the including tier: relative error 9e-8, any exponent
// up to 126, also -infinity; below 2^-125 the result is as good as 0. Local to the including translation unit, for its
// flags are its own.
//     AVX-512  vreduceps (DQ) for the fraction, vscalefps for the power
//     AVX2     adding 1.5 2^23 leaves the integer in the lowest bits; vpslld and vpaddd put it into the exponent
#pragma once

namespace klfast::divergence {
namespace {

// 2^r for 0 <= r <= 1, minimax. Short: one more product, but two chains half as long, for loops that wait for results.
template <bool Short, class V>
V power_of_fraction(V r) {
    if constexpr (!Short) {
        V p = fma(set(0x1.ec320ap-10f), r, set(0x1.26900cp-7f));
        p = fma(p, r, set(0x1.c95446p-5f));
        p = fma(p, r, set(0x1.ebd5a8p-3f));
        p = fma(p, r, set(0x1.62e4f6p-1f));
        return fma(p, r, set(0x1.fffffep-1f));
    }
    const V r2 = r * r;
    const V low = fma(set(0x1.62e4f6p-1f), r, set(0x1.fffffep-1f));
    const V middle = fma(set(0x1.c95446p-5f), r, set(0x1.ebd5a8p-3f));
    const V high = fma(set(0x1.ec320ap-10f), r, set(0x1.26900cp-7f));
    return fma(fma(high, r2, middle), r2, low);
}

#if defined(__AVX512F__)

template <bool Short = true>
Vec power(Vec x) {
    const Vec r{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)};  // x - floor(x); vscalefps takes the floor itself
    return scale(power_of_fraction<Short>(r), x);
}

#elif defined(__AVX2__)

template <bool Short = true>
Vec power(Vec x) {
    const Vec shift = set(0x1.8p23f);  // adding it leaves an integer in the lowest bits
    x = max(x, set(-126.0f));
    const Vec shifted = x + shift, r = x - (shifted - shift);  // |r| <= 1/2
    Vec p = fma(set(0x1.5bba1ap-10f), r, set(0x1.3cea88p-7f));
    p = fma(p, r, set(0x1.c6b752p-5f));
    p = fma(p, r, set(0x1.ebf9bcp-3f));
    if constexpr (Short)
        p = fma(p, r * r, fma(set(0x1.62e42ap-1f), r, set(1.0f)));
    else
        p = fma(fma(p, r, set(0x1.62e42ap-1f)), r, set(1.0f));
    return {_mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23)))};
}

#else

template <bool Short = true>
Vec power(Vec x) {
    return exp2(x);
}

#endif

}  // namespace
}  // namespace klfast::divergence
