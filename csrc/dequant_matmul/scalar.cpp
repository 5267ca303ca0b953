// dequant_matmul at tier scalar: the bodies with vectors of one element.
#include "dequant_matmul/dequant_matmul.h"
#include "vec/scalar.h"

#include "vec/ints_scalar.h"

#include "dequant_matmul/body.h"

namespace klfast::scalar {

void dequant_matmul(const DequantMatmulArgs& args) { run(args); }

}  // namespace klfast::scalar
