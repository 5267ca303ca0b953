// y = x W^T + bias with W quantized, on Layout.PLAIN of klfast/quant/types.py.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "gemm/args.h"

namespace klfast {

struct QuantizedWeight {
    const std::int32_t* packed;  // [n, ceil(k bits / 32)]
    const void* scale;           // [n, groups]
    DType scale_type;
    const std::int32_t* zero_point;  // [ceil(n bits / 32), groups]; nullptr if symmetric
    int bits;                        // 4 or 8
    std::int64_t group;              // values of a row that share a scale, at least 1
    bool int8_activation;
};

struct DequantMatmulArgs : Product, QuantizedWeight {
    std::int64_t groups() const { return (k + group - 1) / group; }
    std::int64_t words() const { return (k * bits + 31) / 32; }  // of a row
};

// Runs the best kernel that `limit` allows. The result does not depend on n_threads.
void dequant_matmul(const DequantMatmulArgs& args, Tier limit);

}  // namespace klfast
