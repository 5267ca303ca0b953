// dequant_matmul at tier avx512bf16: "exact" with bf16 x by vdpbf16ps; whatever else as tier avx512vnni does.
//
// Many rows of x: tiles of gemm/bf16.h.
// Few rows: vpermw looks up the bf16 of 32 digits at a time, by the lowest bits of each 16-bit half of the words; an
// int8 value is 16 times its upper digit less 8 (of int6, less 2), plus its lower digit. A line of 64 bytes takes 4
// look-ups, 3 shifts and 4 products (int4), where floats take 8 each of vpternlogd, vsubps and vfmadd.
#include "matmul/quantized/dequant_matmul.h"
#include "simd/avx512vnni.h"

#include "matmul/quantized/exact_few_rows.h"
#include "matmul/quantized/exact_bf16_source.h"
#include "gemm/bf16.h"

namespace klfast::avx512vnni {
void dequant_matmul(const DequantMatmulArgs&);
}

namespace klfast {
namespace {

// bf16 of `factor` (d - middle), for the digit d in the lowest four bits of an index; bit 4, the next digit's, says
// nothing.
inline __m512i digit_table(int middle, int factor) {
    alignas(64) std::uint16_t table[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) table[i] = float_to_bf16(static_cast<float>(factor * (i % 16 - middle)));
    return _mm512_load_si512(table);
}

// A step takes digit `step` (of 4 or 8 bits) of either half of each word.
template <int Bits>
struct PairLines {
    static constexpr int kBits = Bits == 4 ? 4 : 8, steps = 16 / kBits;  // of a value in its word
    static constexpr bool kUnits = false;
    __m512i low = digit_table(Bits == 4 ? 8 : 0, 1), high = digit_table(Bits == 6 ? 2 : 8, 16);

    float arrange(const float* x, std::int32_t* out) const {
        for (int i = 0; i < kLanes; ++i)
            for (int j = 0; j < steps; ++j) {
                const auto bits = [&](int k) {  // exact: x was bf16
                    return __builtin_bit_cast(std::uint32_t, x[i * 2 * steps + k]) >> 16;
                };
                out[j * kLanes + i] = static_cast<std::int32_t>(bits(j) | bits(j + steps) << 16);
            }
        return 1.0f;
    }

    static __m512 dot(Vec sum, __m512i table, __m512i index, __m512bh x) {
        return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, table)), x);
    }

    template <int R, int M>
    [[gnu::always_inline]] void add(const Ints (&words)[R], const std::int32_t* x, std::int64_t x_pitch, float,
                                    Vec (&acc)[M][R]) const {
        unrolled<steps>([&](int j) KLFAST_INLINE {
            __m512bh pair[M];
            unrolled<M>([&](int m) KLFAST_INLINE {
                pair[m] = reinterpret_cast<__m512bh>(_mm512_load_si512(x + m * x_pitch + j * kLanes));
            });
            unrolled<R>([&](int r) KLFAST_INLINE {
                const __m512i digits = _mm512_srli_epi32(as_words<Bits>(words[r]).v, kBits * j);
                unrolled<M>([&](int m) KLFAST_INLINE {
                    acc[m][r].v = dot(acc[m][r], low, digits, pair[m]);
                    if constexpr (Bits != 4) acc[m][r].v = dot(acc[m][r], high, _mm512_srli_epi32(digits, 4), pair[m]);
                });
            });
        });
    }
};

template <int Bits>
void run_bf16(const DequantMatmulArgs& a) {
    if (a.m <= kFewRows && words_within_groups<Bits>(a)) return ExactFewRows<PairLines, Bits>(a).run();
    const Segments segments(a.k, a.group);
    product_bf16(a, QuantizedPairs<Bits == 4 ? 4 : 8>{.args = a, .segments = segments});
}

}  // namespace

namespace avx512bf16 {

void dequant_matmul(const DequantMatmulArgs& a) {
    const bool pairs_within_groups = a.group % 2 == 0 || a.groups() <= 1;
    if (a.m <= kFewRows && is_narrow(a)) return avx512vnni::dequant_matmul(a);
    if (a.int8_activation || a.x_type != DType::bf16 || a.m == 0 || a.n == 0 || !pairs_within_groups)
        return avx512vnni::dequant_matmul(a);
    if (a.bits == 4)
        run_bf16<4>(a);
    else if (a.bits == 6)
        run_bf16<6>(a);
    else
        run_bf16<8>(a);
}

}  // namespace avx512bf16
}  // namespace klfast
