#include "matmul/quantized/dequant_matmul.h"

namespace klfast {

namespace {
constexpr KernelTable<DequantMatmulKernel> kKernels{
    &scalar::dequant_matmul,
    KLFAST_IF_AVX2(&avx2::dequant_matmul),
    KLFAST_IF_AVXVNNI(&avxvnni::dequant_matmul),
    KLFAST_IF_AVX512VNNI(&avx512vnni::dequant_matmul),
    KLFAST_IF_AVX512BF16(&avx512bf16::dequant_matmul),
    KLFAST_IF_AMX(&amx::dequant_matmul),
};
const Announce announce{"dequant_matmul", kKernels};
}  // namespace

void dequant_matmul(const DequantMatmulArgs& args, Tier limit) { pick(kKernels, limit)(args); }

}  // namespace klfast
