// y = x W^T + bias with W as floats.
#pragma once

#include "core/tiers.h"
#include "gemm/args.h"

namespace klfast {

struct DenseWeight {
    const void* weight;  // [n, k], last dimension contiguous
    DType weight_type;
    std::int64_t weight_stride;  // elements from row to row
};

struct LinearArgs : Product, DenseWeight {};

// Runs the best kernel that `limit` allows. The result does not depend on n_threads.
void linear(const LinearArgs& args, Tier limit);

}  // namespace klfast
