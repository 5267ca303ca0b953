// linear at tier scalar: see the body for the algebra.
#include "vec/scalar.h"

#include "vec/ints_scalar.h"

#include "linear/body.h"

namespace klfast::scalar {

void linear(const LinearArgs& args) { run(args); }

}  // namespace klfast::scalar
