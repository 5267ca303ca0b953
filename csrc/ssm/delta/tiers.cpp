// The gated delta rule at each tier: see the body for the algebra; compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "ssm/delta/gated_delta_rule.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "ssm/delta/body.h"

namespace klfast::KLFAST_TIER {

void gated_delta_rule(const GatedDeltaRuleArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(gated_delta_rule, GatedDeltaRuleArgs)

}  // namespace klfast

#endif
