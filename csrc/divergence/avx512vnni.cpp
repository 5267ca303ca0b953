// The divergence loops at tier avx512vnni: see sums.h for the algebra, vec/avx512.h for the instructions.
#include "vec/avx512.h"

#include "divergence/sums.h"

namespace klfast::avx512vnni {

const divergence::Kernels kDivergence{
    divergence::scan, divergence::sums<false>, divergence::sums<true>, divergence::moments, divergence::powers, divergence::widen};

}  // namespace klfast::avx512vnni
