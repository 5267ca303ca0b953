// The depthwise causal convolution at tier scalar: see the body for the algebra, vec/scalar.h for the instructions.
#include "conv/conv.h"
#include "vec/scalar.h"

#include "vec/ints_scalar.h"

#include "conv/conv_body.h"

namespace klfast::scalar {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::scalar
