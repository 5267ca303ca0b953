// linear at tier avx512vnni: see the body for the algebra.
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "linear/body.h"

namespace klfast::avx512vnni {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
