// Decode attention at tier avx2: see the body for the algebra, simd/floats_avx2.h for the instructions.
#include "attention/decode_attention.h"
#include "simd/floats_avx2.h"

#include "simd/ints_avx2.h"

#include "attention/body.h"

namespace klfast::avx2 {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::avx2
