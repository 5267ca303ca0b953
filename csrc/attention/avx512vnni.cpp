// Decode attention at tier avx512vnni: see the body for the algebra, vec/avx512.h for the instructions.
#include "attention/attention.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "attention/attention_body.h"

namespace klfast::avx512vnni {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
