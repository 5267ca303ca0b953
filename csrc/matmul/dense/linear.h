// y = x W^T + bias with W as floats.
#pragma once

#include "core/tiers.h"
#include "gemm/args.h"

namespace klfast {

struct LinearArgs : Product {
    const void* weight;  // [n, k], last dimension contiguous
    DType weight_type;
    std::int64_t weight_stride;  // elements from row to row
};

using LinearKernel = void(const LinearArgs&);

// Runs the best kernel not above `limit`. The result does not depend on n_threads.
void linear(const LinearArgs& args, Tier limit);

namespace scalar {
void linear(const LinearArgs&);
}
namespace avx2 {
void linear(const LinearArgs&);
}
namespace avx512vnni {
void linear(const LinearArgs&);
}
namespace avx512bf16 {
void linear(const LinearArgs&);
}
namespace amx {
void linear(const LinearArgs&);
}

}  // namespace klfast
