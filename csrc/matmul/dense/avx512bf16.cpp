// linear at tier avx512bf16: bf16 times bf16 by vdpbf16ps; whatever else as tier avx512vnni does.
#include "matmul/dense/linear.h"
#include "simd/avx512vnni.h"

#include "matmul/dense/bf16_source.h"
#include "matmul/dense/few_rows.h"
#include "gemm/bf16.h"

namespace klfast::avx512vnni {
void linear(const LinearArgs&);
}

namespace klfast {
namespace {

// Pairs along k.
struct PairTerms {
    static constexpr int values = 2 * kLanes, size = 2;

    static void arrange(const LinearArgs& a, std::int64_t i, std::int64_t n, std::int32_t* out) {
        write(out, read_pairs(a.x, i, n));
    }
    static Ints read(const void* weight, std::int64_t i, std::int64_t n) { return read_pairs(weight, i, n); }
    static Vec add(Vec sum, Ints weight, const std::int32_t* x) {
        return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(weight.v),
                                 reinterpret_cast<__m512bh>(klfast::read(x).v))};
    }
};

}  // namespace

namespace avx512bf16 {

void linear(const LinearArgs& args) {
    if (args.x_type != DType::bf16 || args.weight_type != DType::bf16) return avx512vnni::linear(args);
    if (args.m == 0 || args.n == 0) return;
    if (args.m <= kFewRows)
        DenseFewRows<PairTerms>(args).run();
    else
        product_bf16(args, Bf16Rows{args});
}

}  // namespace avx512bf16
}  // namespace klfast
