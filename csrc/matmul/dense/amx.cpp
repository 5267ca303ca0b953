// linear at tier amx: bf16 times bf16 by tiles; whatever else as tier avx512bf16 does.
#include "matmul/dense/linear.h"
#include "simd/avx512vnni.h"

#include "matmul/dense/bf16_source.h"
#include "gemm/amx_bf16.h"

namespace klfast::avx512bf16 {
void linear(const LinearArgs&);
}

namespace klfast::amx {

void linear(const LinearArgs& args) {
    const bool bf16 = args.x_type == DType::bf16 && args.weight_type == DType::bf16;
    if (!bf16 || args.m <= kFewRows || args.n == 0) return avx512bf16::linear(args);
    product_bf16_tiles(args, Bf16Rows{args});
}

}  // namespace klfast::amx
