// A vector's values as a tensor stores them. Included after simd/tier.h; local to the including translation unit.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace klfast {
namespace {

inline Vec rounded(Vec v, DType type) {
    if (type == DType::f32) return v;
    alignas(64) std::uint16_t stored[kLanes];
    store(stored, 0, type, kLanes, v);
    return load(stored, 0, type, kLanes);
}

}  // namespace
}  // namespace klfast
