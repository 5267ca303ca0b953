// Kernel table of decode attention.
#include "attention/decode_attention.h"

namespace klfast {
namespace {

const KernelTable<void(const DecodeAttentionArgs&)> kKernels{scalar::decode_attention,
                                                             KLFAST_IF_AVX2(avx2::decode_attention),
                                                             nullptr,
                                                             KLFAST_IF_AVX512VNNI(avx512vnni::decode_attention),
                                                             nullptr,
                                                             nullptr};
const Announce announce{"decode_attention", kKernels};

}  // namespace

void decode_attention(const DecodeAttentionArgs& args, Tier limit) { pick(kKernels, limit)(args); }

}  // namespace klfast
