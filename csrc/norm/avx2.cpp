// RMS normalisation at tier avx2: see the body for the algebra, vec/avx2.h for the instructions.
#include "norm/norm.h"
#include "vec/avx2.h"

#include "vec/ints_avx2.h"

#include "norm/norm_body.h"

namespace klfast::avx2 {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::avx2
