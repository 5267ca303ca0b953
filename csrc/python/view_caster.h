// How a tensor comes from Python: as (address, element type, strides), or None.
#pragma once

#include <cstdint>
#include <stdexcept>

#include <pybind11/pybind11.h>

#include "core/tensor_view.h"

namespace pybind11::detail {

template <>
struct type_caster<klfast::View> {
    PYBIND11_TYPE_CASTER(klfast::View, const_name("tuple[int, int, tuple[int, ...]] | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        const auto parts = reinterpret_borrow<tuple>(source);
        value.data = reinterpret_cast<void*>(parts[0].cast<std::uintptr_t>());
        value.dtype = static_cast<klfast::DType>(parts[1].cast<int>());
        const auto strides = parts[2].cast<tuple>();
        if (strides.size() > 4) throw std::invalid_argument("a view has at most 4 dimensions");
        for (std::size_t i = 0; i < strides.size(); ++i) value.stride[i] = strides[i].cast<std::int64_t>();
        return true;
    }
};

}  // namespace pybind11::detail
