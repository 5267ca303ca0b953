// Two tensors made one, element by element.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "core/tensor_view.h"

namespace klfast {

// Values are rounded to out's type after each step, as separate functions would.
enum class Combination {
    add,             // out = a + factor b
    average,         // out = (a + b) / 2
    multiply,        // out = a b
    silu_gate,       // out = silu(a) b
    sigmoid_gate,    // out = sigmoid(a) b
    gelu_gate,       // out = gelu(a) b
    gelu_tanh_gate,  // out = gelu(a) b, by its tanh approximation
    relu_gate,       // out = max(a, 0) b; the squared ReLU of a where b is a
    softplus_gate,   // out = log(1 + exp(a)) b
};

struct CombineArgs {
    // [rows, width], the last dimension contiguous; out may be a or b. A stride of 0 repeats one row.
    View a, b, out;
    View narrow;  // a copy of out, rounded to its type; may be absent
    std::int64_t rows, width;
    Combination how;
    float factor = 1.0f;
    int n_threads;
};

void combine(const CombineArgs& args, Tier limit);

}  // namespace klfast
