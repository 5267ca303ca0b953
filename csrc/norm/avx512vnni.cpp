// RMS normalisation at tier avx512vnni: see the body for the algebra, simd/floats_avx512.h for the instructions.
#include "norm/rms_norm.h"
#include "simd/floats_avx512.h"

#include "simd/ints_avx512.h"

#include "norm/body.h"

namespace klfast::avx512vnni {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
