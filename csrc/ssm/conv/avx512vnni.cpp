// The depthwise causal convolution at tier avx512vnni: see the body for the algebra, simd/floats_avx512.h for the
// instructions.
#include "ssm/conv/causal_conv1d.h"
#include "simd/floats_avx512.h"

#include "simd/ints_avx512.h"

#include "ssm/conv/body.h"

namespace klfast::avx512vnni {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
