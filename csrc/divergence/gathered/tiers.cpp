// gathered_logits at each tier: compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "divergence/gathered/gathered_logits.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "divergence/gathered/body.h"

namespace klfast::KLFAST_TIER {

void gathered_logits(const GatheredLogitsArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(gathered_logits, GatheredLogitsArgs)

}  // namespace klfast

#endif
