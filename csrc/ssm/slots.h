// Which state of a cache belongs to which entry of a batch.
#pragma once

#include <cstdint>

namespace klfast {

struct Slots {
    const std::int64_t* of = nullptr;  // [batch]; nullptr: each entry's state has its number
    std::int64_t padding = -1;  // the slot of entries without a state, which are skipped: their outputs are zeros

    std::int64_t operator[](std::int64_t entry) const { return of ? of[entry] : entry; }
    bool skips(std::int64_t entry) const { return of && of[entry] == padding; }
};

}  // namespace klfast
