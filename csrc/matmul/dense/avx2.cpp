// linear at tier avx2: see the body for the algebra.
#include "simd/floats_avx2.h"

#include "simd/ints_avx2.h"

#include "matmul/dense/many_rows.h"

namespace klfast::avx2 {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::avx2
