// Decode attention at tier scalar: see the body for the algebra, simd/floats_scalar.h for the instructions.
#include "attention/decode_attention.h"
#include "simd/floats_scalar.h"

#include "simd/ints_scalar.h"

#include "attention/body.h"

namespace klfast::scalar {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::scalar
