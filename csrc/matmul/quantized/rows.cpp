#include "matmul/quantized/rows.h"

#include "matmul/quantized/packed_value.h"

namespace klfast {

void dequantize_row(const DequantMatmulArgs& weight, std::int64_t row, float* out) {
    const std::int64_t groups = weight.groups();
    const std::int32_t* const words = weight.packed + row * weight.stored_words();
    for (std::int64_t g = 0; g < groups; ++g) {
        const float scale = load_float(weight.scale, row * groups + g, weight.scale_type);
        const std::int32_t zero = weight.zero_point
                                      ? value_at(weight.zero_point + g, weight.zero_row + row, groups, weight.bits)
                                      : 1 << (weight.bits - 1);
        const std::int64_t end = (g + 1) * weight.group < weight.k ? (g + 1) * weight.group : weight.k;
        for (std::int64_t k = g * weight.group; k < end; ++k)
            out[k] = static_cast<float>(value_at(words, k, 1, weight.bits) - zero) * scale;
    }
}

}  // namespace klfast
