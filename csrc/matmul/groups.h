// Rows by the matrix that each meets, of a stack of matrices.
#pragma once

#include <cstdint>
#include <vector>

namespace klfast {

// The rows of matrix i are order[first[i]] .. order[first[i + 1]], in ascending order.
struct Groups {
    std::vector<std::int64_t> first, order;

    // index [rows]: a row's matrix, of `count`.
    Groups(const std::int64_t* index, std::int64_t rows, std::int64_t count) : first(count + 2), order(rows) {
        for (std::int64_t row = 0; row < rows; ++row) ++first[index[row] + 2];
        for (std::int64_t i = 2; i < count + 2; ++i) first[i] += first[i - 1];
        for (std::int64_t row = 0; row < rows; ++row) order[first[index[row] + 1]++] = row;
        first.pop_back();
    }

    std::int64_t size(std::int64_t i) const { return first[i + 1] - first[i]; }
};

}  // namespace klfast
