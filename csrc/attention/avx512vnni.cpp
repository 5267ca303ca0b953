// Decode attention at tier avx512vnni: see the body for the algebra, simd/floats_avx512.h for the instructions.
#include "attention/decode_attention.h"
#include "simd/floats_avx512.h"

#include "simd/ints_avx512.h"

#include "attention/body.h"

namespace klfast::avx512vnni {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::avx512vnni
