// linear at tier scalar: see the body for the algebra.
#include "simd/floats_scalar.h"

#include "simd/ints_scalar.h"

#include "matmul/dense/many_rows.h"

namespace klfast::scalar {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::scalar
