// How columns of a program's buffer come from Python: as (buffer, first, width), or None.
#pragma once

#include <pybind11/pybind11.h>

#include "engine/program.h"

namespace pybind11::detail {

template <>
struct type_caster<klfast::engine::Columns> {
    PYBIND11_TYPE_CASTER(klfast::engine::Columns, const_name("tuple[int, int, int] | None"));

    bool load(handle source, bool) {
        value = {};
        if (source.is_none()) return true;
        const auto parts = reinterpret_borrow<tuple>(source);
        value.buffer = parts[0].cast<int>();
        value.first = parts[1].cast<std::int64_t>();
        value.width = parts[2].cast<std::int64_t>();
        return true;
    }
};

}  // namespace pybind11::detail
