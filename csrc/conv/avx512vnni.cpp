// The depthwise causal convolution at tier avx512vnni: see the body for the algebra, vec/avx512.h for the instructions.
#include "conv/conv.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "conv/conv_body.h"

namespace klfast::avx512vnni {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
