// The recurrences at tier avx2: see the bodies for the algebra, vec/avx2.h for the instructions.
#include "scan/scan.h"
#include "vec/avx2.h"

#include "vec/ints_avx2.h"

#include "scan/chunk_scan_body.h"
#include "scan/selective_scan_body.h"
#include "scan/state_update_body.h"

namespace klfast::avx2 {

void selective_scan(const SelectiveScanArgs& args) { run(args); }
void selective_state_update(const StateUpdateArgs& args) { run(args); }
void mamba_chunk_scan(const ChunkScanArgs& args) { run(args); }

}  // namespace klfast::avx2
