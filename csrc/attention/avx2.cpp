// Decode attention at tier avx2: see the body for the algebra, vec/avx2.h for the instructions.
#include "attention/attention.h"
#include "vec/avx2.h"

#include "vec/ints_avx2.h"

#include "attention/attention_body.h"

namespace klfast::avx2 {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::avx2
