// Rows of floats as a source of products in float32, for many rows of x. Included by each tier after its vectors.
#pragma once

#include "matmul/dense/few_rows.h"
#include "gemm/fp32.h"

namespace klfast {
namespace {

struct FloatRows {
    const LinearArgs& args;

    struct Panels {
        const LinearArgs& args;
        std::int64_t n0 = 0;

        explicit Panels(const FloatRows& source) : args(source.args) {}
        void load(std::int64_t row) { n0 = row; }

        void fill(std::int64_t block, std::int64_t depth, float* out) const {
            for (int half = 0; half < 2; ++half)
                for (std::int64_t k = 0; k < depth; k += kLanes) {
                    Ints rows[kLanes];
                    for (int lane = 0; lane < kLanes; ++lane) {
                        const std::int64_t n =
                            smaller(n0 + half * kLanes + lane, args.n - 1);  // columns behind the last are not stored
                        rows[lane] =
                            bits_of(klfast::load(args.weight, n * args.weight_stride + block + k, args.weight_type,
                                                 static_cast<int>(smaller(kLanes, depth - k))));
                    }
                    transpose(rows);
                    for (int i = 0; i < kLanes; ++i)
                        write(reinterpret_cast<std::int32_t*>(out + (k + i) * kPair + half * kLanes), rows[i]);
                }
        }
    };
};

inline void run(const LinearArgs& args) {
    if (args.m == 0 || args.n == 0) return;
    if (args.m <= kFewRows)
        few_rows(args);
    else
        product_fp32(args, FloatRows{args});
}

}  // namespace
}  // namespace klfast
