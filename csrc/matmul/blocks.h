// Some rows of a weight as a weight of its own: one matrix of a stack.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matmul/dense/linear.h"
#include "matmul/quantized/dequant_matmul.h"

namespace klfast {

// The arguments with rows first .. first + n of the weight; without bias.
inline DequantMatmulArgs block(DequantMatmulArgs args, std::int64_t first, std::int64_t n) {
    args.packed += first * args.stored_words();
    args.scale = static_cast<const std::byte*>(args.scale) + first * args.groups() * size_of(args.scale_type);
    args.zero_row += first;
    args.bias = nullptr, args.n = n;
    return args;
}

inline LinearArgs block(LinearArgs args, std::int64_t first, std::int64_t n) {
    args.weight = static_cast<const std::byte*>(args.weight) + first * args.weight_stride * size_of(args.weight_type);
    args.bias = nullptr, args.n = n;
    return args;
}

}  // namespace klfast
