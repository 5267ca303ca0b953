// RMS normalisation at each tier: see the body for the algebra; compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "norm/rms_norm.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "norm/body.h"

namespace klfast::KLFAST_TIER {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(rms_norm, RmsNormArgs)

}  // namespace klfast

#endif
