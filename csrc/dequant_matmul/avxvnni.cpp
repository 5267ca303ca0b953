// dequant_matmul at tier avxvnni: AVX2 with vpdpbusd for "int8"; see the bodies for the algebra.
#include "dequant_matmul/dequant_matmul.h"
#include "vec/avx2.h"

#include "vec/dot_avxvnni.h"

#include "dequant_matmul/body.h"

namespace klfast::avxvnni {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::avxvnni
