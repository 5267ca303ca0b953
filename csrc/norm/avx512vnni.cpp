// RMS normalisation at tier avx512vnni: see the body for the algebra, vec/avx512.h for the instructions.
#include "norm/norm.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "norm/norm_body.h"

namespace klfast::avx512vnni {

void rms_norm(const RmsNormArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
