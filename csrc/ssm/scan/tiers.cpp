// The recurrences at each tier: see the bodies for the algebra; compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "ssm/scan/scan.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "ssm/scan/chunk_scan.h"
#include "ssm/scan/selective_scan.h"
#include "ssm/scan/state_update.h"

namespace klfast::KLFAST_TIER {

void selective_scan(const SelectiveScanArgs& args) { run(args); }
void selective_state_update(const StateUpdateArgs& args) { run(args); }
void mamba_chunk_scan(const ChunkScanArgs& args) { run(args); }

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_DISPATCH(selective_scan, SelectiveScanArgs)
KLFAST_DISPATCH(selective_state_update, StateUpdateArgs)
KLFAST_DISPATCH(mamba_chunk_scan, ChunkScanArgs)

}  // namespace klfast

#endif
