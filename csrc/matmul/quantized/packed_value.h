// Single values of packed weights and zero points. Local to the including translation unit, for its flags are its own.
#pragma once

#include <cstdint>

namespace klfast {
namespace {

// Value i of a run of packed ones, whose words lie `pitch` apart.
inline std::int32_t value_at(const std::int32_t* words, std::int64_t i, std::int64_t pitch, int bits) {
    const std::int64_t bit = i * bits, word = bit / 32 * pitch;
    const int shift = static_cast<int>(bit % 32);
    std::uint64_t both = static_cast<std::uint32_t>(words[word]);
    if (shift + bits > 32) both |= static_cast<std::uint64_t>(static_cast<std::uint32_t>(words[word + pitch])) << 32;
    return static_cast<std::int32_t>(both >> shift & ((1 << bits) - 1));
}

}  // namespace
}  // namespace klfast
