// How slots come from Python: as (address of int64 values, padding), or None.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

#include "ssm/slots.h"

namespace pybind11::detail {

template <>
struct type_caster<klfast::Slots> {
    PYBIND11_TYPE_CASTER(klfast::Slots, const_name("tuple[int, int] | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        const auto parts = reinterpret_borrow<tuple>(source);
        value.of = reinterpret_cast<const std::int64_t*>(parts[0].cast<std::uintptr_t>());
        value.padding = parts[1].cast<std::int64_t>();
        return true;
    }
};

}  // namespace pybind11::detail
