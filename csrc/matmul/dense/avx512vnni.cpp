// linear at tier avx512vnni: see the body for the algebra.
#include "simd/floats_avx512.h"

#include "simd/ints_avx512.h"

#include "matmul/dense/many_rows.h"

namespace klfast::avx512vnni {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
