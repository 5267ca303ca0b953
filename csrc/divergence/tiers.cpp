// The divergence loops at each tier: see vector_loops.h for the algebra; compiled once for each (core/kernel_table.h).
#define KLFAST_TIERS scalar, avx2, avx512vnni

#include "divergence/divergence.h"

#ifdef KLFAST_TIER

#include "simd/tier.h"
#include "divergence/vector_loops.h"

namespace klfast::KLFAST_TIER {

extern const divergence::Kernels kDivergence{
    .scan = divergence::scan,
    .sums = divergence::sums<false>,
    .wide_sums = divergence::sums<true>,
    .moments = divergence::moments,
    .powers = divergence::powers,
    .widen = divergence::widen,
};

}  // namespace klfast::KLFAST_TIER

#else

#include "core/kernel_table.h"

namespace klfast {

KLFAST_KERNEL_TABLE(kTable, kDivergence, const divergence::Kernels)
const Announce announce_logits{"logit_divergence", kTable}, announce_linear{"linear_divergence", kTable};

const divergence::Kernels& divergence::best_kernels(Tier limit) {
    static const KernelChoice best(kTable);
    return *best[limit];
}

}  // namespace klfast

#endif
