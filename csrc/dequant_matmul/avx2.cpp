// dequant_matmul at tier avx2: see the bodies for the algebra, vec/dot_avx2.h for the instructions.
#include "dequant_matmul/dequant_matmul.h"
#include "vec/avx2.h"

#include "vec/dot_avx2.h"

#include "dequant_matmul/body.h"

namespace klfast::avx2 {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::avx2
