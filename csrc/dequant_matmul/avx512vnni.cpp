// dequant_matmul at tier avx512vnni: see the bodies for the algebra, ints_avx512.h for the instructions.
#include "dequant_matmul/dequant_matmul.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "dequant_matmul/body.h"

namespace klfast::avx512vnni {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
