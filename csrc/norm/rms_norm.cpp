// Kernel table of the normalisation.
#include "norm/rms_norm.h"

namespace klfast {
namespace {

const KernelTable<void(const RmsNormArgs&)> kKernels{scalar::rms_norm, KLFAST_IF_AVX2(avx2::rms_norm),
                                                     nullptr,          KLFAST_IF_AVX512VNNI(avx512vnni::rms_norm),
                                                     nullptr,          nullptr};
const Announce announce{"rms_norm", kKernels};

}  // namespace

void rms_norm(const RmsNormArgs& args, Tier limit) { pick(kKernels, limit)(args); }

}  // namespace klfast
