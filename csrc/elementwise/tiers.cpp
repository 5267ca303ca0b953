// Combinations, weighted sums and largest values at each tier: see the bodies; compiled once for each
// (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "elementwise/combine.h"
#include "elementwise/largest.h"
#include "elementwise/weighted_sum.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "elementwise/body.h"
#include "elementwise/largest_body.h"
#include "elementwise/weighted_sum_body.h"

namespace klfast::KLFAST_TIER {

void combine(const CombineArgs& args) { run(args); }
void weighted_sum(const WeightedSumArgs& args) { run(args); }
void largest(const LargestArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(combine, CombineArgs)
KLFAST_DISPATCH(weighted_sum, WeightedSumArgs)
KLFAST_DISPATCH(largest, LargestArgs)

}  // namespace klfast

#endif
