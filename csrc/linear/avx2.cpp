// linear at tier avx2: see the body for the algebra.
#include "vec/avx2.h"

#include "vec/ints_avx2.h"

#include "linear/body.h"

namespace klfast::avx2 {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::avx2
