// The recurrences at tier scalar: see the bodies for the algebra, vec/scalar.h for the instructions.
#include "scan/scan.h"
#include "vec/scalar.h"

#include "vec/ints_scalar.h"

#include "scan/chunk_scan_body.h"
#include "scan/selective_scan_body.h"
#include "scan/state_update_body.h"

namespace klfast::scalar {

void selective_scan(const SelectiveScanArgs& args) { run(args); }
void selective_state_update(const StateUpdateArgs& args) { run(args); }
void mamba_chunk_scan(const ChunkScanArgs& args) { run(args); }

}  // namespace klfast::scalar
