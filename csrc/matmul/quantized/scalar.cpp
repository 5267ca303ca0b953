// dequant_matmul at tier scalar: the bodies with vectors of one element.
#include "matmul/quantized/dequant_matmul.h"
#include "simd/floats_scalar.h"

#include "simd/ints_scalar.h"

#include "matmul/quantized/choose.h"

namespace klfast::scalar {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::scalar
