// How y is divided among threads: into panels of a few vectors of its columns, each times a share of its rows.
#pragma once

#include "gemm/common.h"

namespace klfast {
namespace {

// Threads share panels where there are few of them, each with some of the rows. Laying a panel out a second time costs
// more than an uneven end does: four items a thread are enough.
struct Division {
    std::int64_t vectors, panels, tiles, shares;

    struct Item {
        std::int64_t v0, width;    // vectors of the panel
        std::int64_t first, last;  // tiles of rows
    };

    // `widest`: vectors of a panel at most; `tiles`: of rows, all of about a height; `least`: shares wanted.
    Division(const Product& a, int widest, std::int64_t row_tiles, int threads, std::int64_t least = 1)
        : vectors((a.n + kLanes - 1) / kLanes), panels((vectors + widest - 1) / widest), tiles(row_tiles) {
        const std::int64_t wanted = (4 * threads + panels - 1) / panels;
        shares = larger(1, smaller(tiles, larger(wanted, least)));
    }

    std::int64_t count() const { return panels * shares; }

    // Neighbours have the same rows, and panels are of nearly equal width.
    Item operator[](std::int64_t item) const {
        const std::int64_t panel = item % panels, share = item / panels, v0 = vectors * panel / panels;
        return {
            .v0 = v0,
            .width = vectors * (panel + 1) / panels - v0,
            .first = tiles * share / shares,
            .last = tiles * (share + 1) / shares,
        };
    }
};

}  // namespace
}  // namespace klfast
