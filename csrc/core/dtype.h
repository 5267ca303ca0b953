// Element types of tensors and their conversions to and from float, for scalar code.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace klfast {

// The values are those that klfast/backends/cpu/memory.py passes for a torch.dtype.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline constexpr int size_of(DType t) { return t == DType::f32 ? 4 : 2; }

inline float bf16_to_float(std::uint16_t v) { return std::bit_cast<float>(static_cast<std::uint32_t>(v) << 16); }

// Round to nearest even; a NaN stays a NaN.
inline std::uint16_t float_to_bf16(float v) {
    const auto u = std::bit_cast<std::uint32_t>(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
    return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// IEEE 754 binary16: 1 sign, 5 exponent (bias 15) and 10 fraction bits.
inline float f16_to_float(std::uint16_t v) {
    const std::uint32_t sign = static_cast<std::uint32_t>(v & 0x8000u) << 16, exponent = (v >> 10) & 0x1fu,
                        fraction = v & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
    return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

inline std::uint16_t float_to_f16(float v) {
    const auto u = std::bit_cast<std::uint32_t>(v);
    const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds beyond 65504
    if (magnitude < 0x38800000u) {                        // subnormal result: adding 0.5 lets the FPU round at 2^-24
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float load_float(const void* p, std::int64_t i, DType t) {
    if (t == DType::f32) return static_cast<const float*>(p)[i];
    const std::uint16_t v = static_cast<const std::uint16_t*>(p)[i];
    return t == DType::bf16 ? bf16_to_float(v) : f16_to_float(v);
}

inline void store_float(void* p, std::int64_t i, DType t, float v) {
    if (t == DType::f32)
        static_cast<float*>(p)[i] = v;
    else
        static_cast<std::uint16_t*>(p)[i] = t == DType::bf16 ? float_to_bf16(v) : float_to_f16(v);
}

// A number as a tensor stores it.
inline float rounded(float v, DType type) {
    std::uint32_t stored;
    store_float(&stored, 0, type, v);
    return load_float(&stored, 0, type);
}

}  // namespace klfast
