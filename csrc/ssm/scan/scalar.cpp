// The recurrences at tier scalar: see the bodies for the algebra, simd/floats_scalar.h for the instructions.
#include "ssm/scan/scan.h"
#include "simd/floats_scalar.h"

#include "simd/ints_scalar.h"

#include "ssm/scan/chunk_scan.h"
#include "ssm/scan/selective_scan.h"
#include "ssm/scan/state_update.h"

namespace klfast::scalar {

void selective_scan(const SelectiveScanArgs& args) { run(args); }
void selective_state_update(const StateUpdateArgs& args) { run(args); }
void mamba_chunk_scan(const ChunkScanArgs& args) { run(args); }

}  // namespace klfast::scalar
