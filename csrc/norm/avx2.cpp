// RMS normalisation at tier avx2: see the body for the algebra, simd/floats_avx2.h for the instructions.
#include "norm/rms_norm.h"
#include "simd/floats_avx2.h"

#include "simd/ints_avx2.h"

#include "norm/body.h"

namespace klfast::avx2 {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::avx2
