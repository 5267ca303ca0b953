// linear at each tier: see the bodies for the algebra; compiled once for each that has no file of its own
// (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni, avx512bf16, amx

#include "matmul/dense/linear.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "matmul/dense/many_rows.h"

namespace klfast::KLFAST_TIER {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(linear, LinearArgs)

}  // namespace klfast

#endif
