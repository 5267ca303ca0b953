// The depthwise causal convolution at tier scalar: see the body for the algebra, simd/floats_scalar.h for the
// instructions.
#include "ssm/conv/causal_conv1d.h"
#include "simd/floats_scalar.h"

#include "simd/ints_scalar.h"

#include "ssm/conv/body.h"

namespace klfast::scalar {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::scalar
