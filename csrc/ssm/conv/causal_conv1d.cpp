// Kernel table of the causal convolution, which serves two ops.
#include "ssm/conv/causal_conv1d.h"

namespace klfast {
namespace {

const KernelTable<void(const ConvArgs&)> kKernels{scalar::causal_conv1d,
                                                  KLFAST_IF_AVX2(avx2::causal_conv1d),
                                                  nullptr,
                                                  KLFAST_IF_AVX512VNNI(avx512vnni::causal_conv1d),
                                                  nullptr,
                                                  nullptr};
const Announce announce{"causal_conv1d", kKernels}, announce_update{"causal_conv1d_update", kKernels};

}  // namespace

void causal_conv1d(const ConvArgs& args, Tier limit) { pick(kKernels, limit)(args); }

}  // namespace klfast
