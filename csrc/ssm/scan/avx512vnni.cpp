// The recurrences at tier avx512vnni: see the bodies for the algebra, simd/floats_avx512.h for the instructions.
#include "ssm/scan/scan.h"
#include "simd/floats_avx512.h"

#include "simd/ints_avx512.h"

#include "ssm/scan/chunk_scan.h"
#include "ssm/scan/selective_scan.h"
#include "ssm/scan/state_update.h"

namespace klfast::avx512vnni {

void selective_scan(const SelectiveScanArgs& args) { run(args); }
void selective_state_update(const StateUpdateArgs& args) { run(args); }
void mamba_chunk_scan(const ChunkScanArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
