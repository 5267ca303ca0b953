// RMS normalisation at tier scalar: see the body for the algebra, vec/scalar.h for the instructions.
#include "norm/norm.h"
#include "vec/scalar.h"

#include "vec/ints_scalar.h"

#include "norm/norm_body.h"

namespace klfast::scalar {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::scalar
