// Products with a stack of quantized matrices of which each row of x meets a few: the experts of a language model.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "matmul/quantized/dequant_matmul.h"

namespace klfast {

struct GroupedDequantMatmulArgs {
    DequantMatmulArgs one;      // the first matrix, whose n rows the others' follow; x [m, k], y [m, each, n]
    const std::int64_t* index;  // [m, each]: the matrices that a row of x meets
    std::int64_t each, count;   // count: matrices
};

// Calls dequant_matmul once for each matrix that a row meets, and reads no other. Returns false, with nothing done, if
// an index is not in [0, count). Not for a team (core/team.h): y's rows go through scratch that its members do not
// share.
bool grouped_dequant_matmul(const GroupedDequantMatmulArgs& args, Tier limit);

}  // namespace klfast
