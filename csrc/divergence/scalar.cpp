// The divergence loops at tier scalar: see sums.h for the algebra, vec/scalar.h for the instructions.
#include "vec/scalar.h"

#include "divergence/sums.h"

namespace klfast::scalar {

const divergence::Kernels kDivergence{
    divergence::scan, divergence::sums<false>, divergence::sums<true>, divergence::moments, divergence::powers, divergence::widen};

}  // namespace klfast::scalar
