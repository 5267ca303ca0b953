// The divergence loops at tier avx2: see vector_loops.h for the algebra, simd/floats_avx2.h for the instructions.
#include "simd/floats_avx2.h"

#include "divergence/vector_loops.h"

namespace klfast::avx2 {

const divergence::Kernels kDivergence{divergence::scan,    divergence::sums<false>, divergence::sums<true>,
                                      divergence::moments, divergence::powers,      divergence::widen};

}  // namespace klfast::avx2
