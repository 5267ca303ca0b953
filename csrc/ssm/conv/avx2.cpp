// The depthwise causal convolution at tier avx2: see the body for the algebra, simd/floats_avx2.h for the instructions.
#include "ssm/conv/causal_conv1d.h"
#include "simd/floats_avx2.h"

#include "simd/ints_avx2.h"

#include "ssm/conv/body.h"

namespace klfast::avx2 {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::avx2
