// Decode attention at each tier: see the body for the algebra; compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "attention/decode_attention.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "attention/body.h"

namespace klfast::KLFAST_TIER {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(decode_attention, DecodeAttentionArgs)

}  // namespace klfast

#endif
