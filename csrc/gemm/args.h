// What dequant_matmul and linear have in common: y [m, n] = x [m, k] W^T + bias, whatever W [n, k] is stored as.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace klfast {

inline constexpr int kFewRows = 8;  // rows of x that are multiplied by W as it lies

struct Product {
    const void* x;  // [m, k], last dimension contiguous
    DType x_type;
    std::int64_t x_stride;  // elements from row to row
    const void* bias;       // [bias_rows, n], row i for row i % bias_rows of y; nullptr without
    DType bias_type;
    std::int64_t bias_rows = 1;
    void* y;  // [m, n], contiguous; values are rounded to rounded_to and then stored as y_type, at least as wide
    DType y_type, rounded_to;
    std::int64_t m, n, k;
    int n_threads;

    // Where the bias of row m of y begins.
    std::int64_t bias_from(std::int64_t m) const { return bias_rows == 1 ? 0 : m % bias_rows * n; }
};

}  // namespace klfast
