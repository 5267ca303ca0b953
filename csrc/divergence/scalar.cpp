// The divergence loops at tier scalar: see vector_loops.h for the algebra, simd/floats_scalar.h for the instructions.
#include "simd/floats_scalar.h"

#include "divergence/vector_loops.h"

namespace klfast::scalar {

const divergence::Kernels kDivergence{divergence::scan,    divergence::sums<false>, divergence::sums<true>,
                                      divergence::moments, divergence::powers,      divergence::widen};

}  // namespace klfast::scalar
