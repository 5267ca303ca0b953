// A number as a tensor stores it.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace klfast::engine {

inline float rounded(float v, DType type) {
    std::uint32_t stored;
    store_float(&stored, 0, type, v);
    return load_float(&stored, 0, type);
}

}  // namespace klfast::engine
