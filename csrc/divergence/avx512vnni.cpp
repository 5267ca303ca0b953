// The divergence loops at tier avx512vnni: see vector_loops.h for the algebra, simd/floats_avx512.h for the
// instructions.
#include "simd/floats_avx512.h"

#include "divergence/vector_loops.h"

namespace klfast::avx512vnni {

const divergence::Kernels kDivergence{divergence::scan,    divergence::sums<false>, divergence::sums<true>,
                                      divergence::moments, divergence::powers,      divergence::widen};

}  // namespace klfast::avx512vnni
