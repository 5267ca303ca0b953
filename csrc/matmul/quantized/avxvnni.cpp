// dequant_matmul at tier avxvnni: AVX2 with vpdpbusd for "int8"; see the bodies for the algebra.
#include "matmul/quantized/dequant_matmul.h"
#include "simd/floats_avx2.h"

#include "simd/dot_avxvnni.h"

#include "matmul/quantized/choose.h"

namespace klfast::avxvnni {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::avxvnni
