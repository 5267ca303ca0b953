#include "matmul/quantized/rows.h"

namespace klfast {
namespace {

// Value i of a run of packed ones, whose words lie `pitch` apart.
std::int32_t value_at(const std::int32_t* words, std::int64_t i, std::int64_t pitch, int bits) {
    const std::int64_t bit = i * bits, word = bit / 32 * pitch;
    const int shift = static_cast<int>(bit % 32);
    std::uint64_t both = static_cast<std::uint32_t>(words[word]);
    if (shift + bits > 32) both |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(words[word + pitch])) << 32;
    return static_cast<std::int32_t>(both >> shift & ((1 << bits) - 1));
}

}  // namespace

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
