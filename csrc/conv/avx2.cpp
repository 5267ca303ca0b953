// The depthwise causal convolution at tier avx2: see the body for the algebra, vec/avx2.h for the instructions.
#include "conv/conv.h"
#include "vec/avx2.h"

#include "vec/ints_avx2.h"

#include "conv/conv_body.h"

namespace klfast::avx2 {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::avx2
