// y = x W^T + bias with W quantized, on Layout.PLAIN of klfast/quant/layouts.py.
//
// Kernels are written for words of eight int4 or four int8 values. Of int6 three bytes, a unit, hold four values, and
// become such a word on the way in: with the four behind one another for float kernels, with a byte each for all others
// (read_six and six_to_bytes in simd/ints_*.h).
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
    std::int64_t zero_row = 0;       // the weight's first row among those that zero_point has
    int bits;                        // 4, 6 or 8
    std::int64_t group;              // values of a row that share a scale, at least 1
    bool int8_activation;
};

struct DequantMatmulArgs : Product, QuantizedWeight {
    // [bias_rows, k]; nullptr without. Taken off x, row i % bias_rows off row i, before that is rounded to int8.
    const float* known_x = nullptr;

    std::int64_t groups() const { return (k + group - 1) / group; }
    std::int64_t words() const { return bits == 4 ? (k + 7) / 8 : (k + 3) / 4; }  // of a row, as kernels take them
    std::int64_t stored_words() const { return (k * bits + 31) / 32; }            // of a row, in memory
};

// Runs the best kernel that `limit` allows. The result does not depend on n_threads.
void dequant_matmul(const DequantMatmulArgs& args, Tier limit);

}  // namespace klfast
