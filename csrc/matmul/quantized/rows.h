// Single rows of a quantized weight as floats, as an embedding reads them.
#pragma once

#include <cstdint>

#include "matmul/quantized/dequant_matmul.h"

namespace klfast {

// out [k] = row `row` of a weight.
void dequantize_row(const DequantMatmulArgs& weight, std::int64_t row, float* out);

}  // namespace klfast
