// linear at tier amx: bf16 times bf16 by tiles; whatever else as tier avx512bf16 does.
#include "linear/linear.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "linear/bf16_rows.h"
#include "product/bf16_tiles.h"

namespace klfast::amx {

void linear(const LinearArgs& args) {
    const bool bf16 = args.x_type == DType::bf16 && args.weight_type == DType::bf16;
    if (!bf16 || args.m <= kFewRows || args.n == 0) return avx512bf16::linear(args);
    product_bf16_tiles(args, Bf16Rows{args});
}

}  // namespace klfast::amx
