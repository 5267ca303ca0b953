// dequant_matmul at tier avx2: see the bodies for the algebra, simd/dot_avx2.h for the instructions.
#include "matmul/quantized/dequant_matmul.h"
#include "simd/floats_avx2.h"

#include "simd/dot_avx2.h"

#include "matmul/quantized/choose.h"

namespace klfast::avx2 {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::avx2
