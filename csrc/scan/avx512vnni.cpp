// The recurrences at tier avx512vnni: see the bodies for the algebra, vec/avx512.h for the instructions.
#include "scan/scan.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "scan/chunk_scan_body.h"
#include "scan/selective_scan_body.h"
#include "scan/state_update_body.h"

namespace klfast::avx512vnni {

void selective_scan(const SelectiveScanArgs& args) { run(args); }
void selective_state_update(const StateUpdateArgs& args) { run(args); }
void mamba_chunk_scan(const ChunkScanArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
