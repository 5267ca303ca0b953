// Kernel tables of the state-space recurrences.
#include "ssm/scan/scan.h"

namespace klfast {

#define KLFAST_SCAN_ENTRY(op, Args)                                                                             \
    namespace {                                                                                                 \
    const KernelTable<void(const Args&)> k_##op{                                                                \
        scalar::op, KLFAST_IF_AVX2(avx2::op), nullptr, KLFAST_IF_AVX512VNNI(avx512vnni::op), nullptr, nullptr}; \
    const Announce announce_##op{#op, k_##op};                                                                  \
    }                                                                                                           \
    void op(const Args& args, Tier limit) { pick(k_##op, limit)(args); }
KLFAST_SCAN_ENTRY(selective_scan, SelectiveScanArgs)
KLFAST_SCAN_ENTRY(selective_state_update, StateUpdateArgs)
KLFAST_SCAN_ENTRY(mamba_chunk_scan, ChunkScanArgs)
#undef KLFAST_SCAN_ENTRY

}  // namespace klfast
