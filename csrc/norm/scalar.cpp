// RMS normalisation at tier scalar: see the body for the algebra, simd/floats_scalar.h for the instructions.
#include "norm/rms_norm.h"
#include "simd/floats_scalar.h"

#include "simd/ints_scalar.h"

#include "norm/body.h"

namespace klfast::scalar {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::scalar
