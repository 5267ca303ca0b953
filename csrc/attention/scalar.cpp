// Decode attention at tier scalar: see the body for the algebra, vec/scalar.h for the instructions.
#include "attention/attention.h"
#include "vec/scalar.h"

#include "vec/ints_scalar.h"

#include "attention/attention_body.h"

namespace klfast::scalar {

void decode_attention(const DecodeAttentionArgs& args) { run(args); }

}  // namespace klfast::scalar
