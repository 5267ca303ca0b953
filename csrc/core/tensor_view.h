// A tensor as a kernel sees it: address, element type, strides in elements.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace klfast {

struct View {
    void* data = nullptr;  // nullptr: an optional tensor that is absent
    DType dtype = DType::f32;
    std::int64_t stride[4] = {0, 0, 0, 0};

    explicit operator bool() const { return data != nullptr; }
};

}  // namespace klfast
