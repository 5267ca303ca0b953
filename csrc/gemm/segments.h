// Segments: runs of neighbouring values of a row that belong to one group (and so have one scale) and one block.
#pragma once

#include "gemm/common.h"

namespace klfast {
namespace {

struct Segment {
    std::int64_t begin, end, group;
};

struct Segments {
    Buffer<Segment> list;
    std::int64_t count = 0;

    Segments(std::int64_t k, std::int64_t group) : list((k + group - 1) / group + (k + kBlock - 1) / kBlock) {
        for (std::int64_t begin = 0; begin < k;) {
            const std::int64_t g = begin / group;
            const std::int64_t end = smaller(smaller((g + 1) * group, (begin / kBlock + 1) * kBlock), k);
            list[count++] = {.begin = begin, .end = end, .group = g};
            begin = end;
        }
    }

    // Calls each(segment) for those that begin in [begin, end), the bounds of a block.
    template <class Each>
    void within(std::int64_t begin, std::int64_t end, Each&& each) const {
        std::int64_t low = 0, high = count;
        while (low < high) {
            const std::int64_t middle = (low + high) / 2;
            if (list[middle].begin < begin)
                low = middle + 1;
            else
                high = middle;
        }
        for (; low < count && list[low].begin < end; ++low) each(list[low]);
    }
};

}  // namespace
}  // namespace klfast
