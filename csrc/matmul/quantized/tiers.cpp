// dequant_matmul at each tier: see the bodies for the algebra; compiled once for each that has no file of its own
// (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avxvnni, avx512vnni, avx512bf16, amx

#include "matmul/quantized/dequant_matmul.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "matmul/quantized/choose.h"

namespace klfast::KLFAST_TIER {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(dequant_matmul, DequantMatmulArgs)
const Announce announce_grouped{"grouped_dequant_matmul", k_dequant_matmul};  // which runs it, matrix by matrix

}  // namespace klfast

#endif
