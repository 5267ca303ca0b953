// The kernels without Python: checks the named families, all by default, at every tier of this machine.
#include <cstdio>
#include <cstring>

#include "check.h"

int main(int count, char** arguments) {
    using namespace klfast::test;
    const struct {
        const char* name;
        void (*check)();
    } families[] = {
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
    for (const auto& family : families) {
        bool wanted = count == 1;
        for (int i = 1; i < count; ++i) wanted = wanted || std::strcmp(arguments[i], family.name) == 0;
        if (wanted) family.check();
    }
    return report() ? 0 : 1;
}
