// The divergence loops at tier avx2: see sums.h for the algebra, vec/avx2.h for the instructions.
#include "vec/avx2.h"

#include "divergence/sums.h"

namespace klfast::avx2 {

const divergence::Kernels kDivergence{
    divergence::scan, divergence::sums<false>, divergence::sums<true>, divergence::moments, divergence::powers, divergence::widen};

}  // namespace klfast::avx2
