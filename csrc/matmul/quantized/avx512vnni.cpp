// dequant_matmul at tier avx512vnni: see the bodies for the algebra, ints_avx512.h for the instructions.
#include "matmul/quantized/dequant_matmul.h"
#include "simd/floats_avx512.h"

#include "simd/ints_avx512.h"

#include "matmul/quantized/choose.h"

namespace klfast::avx512vnni {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
