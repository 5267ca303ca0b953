// Combinations at each tier: see the body; compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "elementwise/combine.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "elementwise/body.h"

namespace klfast::KLFAST_TIER {

void combine(const CombineArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(combine, CombineArgs)

}  // namespace klfast

#endif
