// The depthwise causal convolution at each tier: see the body for the algebra; compiled once for each
// (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "ssm/conv/causal_conv1d.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "ssm/conv/body.h"

namespace klfast::KLFAST_TIER {

void causal_conv1d(const ConvArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(causal_conv1d, ConvArgs)
const Announce announce_update{"causal_conv1d_update", k_causal_conv1d};  // the same kernels

}  // namespace klfast

#endif
