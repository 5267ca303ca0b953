// Kernel table of linear.
#include "matmul/dense/linear.h"

namespace klfast {
namespace {

constexpr KernelTable<LinearKernel> kKernels{
    &scalar::linear,
    KLFAST_IF_AVX2(&avx2::linear),
    nullptr,
    KLFAST_IF_AVX512VNNI(&avx512vnni::linear),
    KLFAST_IF_AVX512BF16(&avx512bf16::linear),
    KLFAST_IF_AMX(&amx::linear),
};
const Announce announce{"linear", kKernels};

}  // namespace

void linear(const LinearArgs& args, Tier limit) { pick(kKernels, limit)(args); }

}  // namespace klfast
