// The families of ops, each with its check.
#pragma once

#include "check.h"

namespace klfast::test {

struct Family {
    const char* name;
    void (*check)();
};

inline constexpr Family kFamilies[] = {
    {.name = "quantized_matmul", .check = check_quantized_matmul},
    {.name = "dense_matmul", .check = check_dense_matmul},
    {.name = "attention", .check = check_attention},
    {.name = "divergence", .check = check_divergence},
    {.name = "gathered_logits", .check = check_gathered_logits},
    {.name = "conv", .check = check_conv},
    {.name = "scan", .check = check_scan},
    {.name = "delta", .check = check_delta},
    {.name = "norm", .check = check_norm},
    {.name = "elementwise", .check = check_elementwise},
};

}  // namespace klfast::test
