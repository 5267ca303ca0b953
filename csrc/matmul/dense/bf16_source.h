// Rows of bf16 as a source of products in bf16. Included by the tiers with AVX-512-BF16 only.
#pragma once

#include "matmul/dense/linear.h"
#include "gemm/common.h"

namespace klfast {
namespace {

// n values from index i on, zeros behind them.
inline Ints read_pairs(const void* values, std::int64_t i, std::int64_t n) {
    const __mmask32 mask = n >= 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return {_mm512_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(values) + i)};
}

struct Bf16Rows {
    const LinearArgs& args;
    std::int64_t depth = args.k;

    struct Panels {
        const LinearArgs& args;
        explicit Panels(const Bf16Rows& source) : args(source.args) {}

        void load(std::int64_t n0, std::int64_t vectors, std::int32_t* pairs, float* scale) const {
            const std::int64_t pairs_in_all = (args.k + 1) / 2;
            for (std::int64_t v = 0; v < vectors; ++v) {
                store(scale + v * kLanes, set(1.0f));
                for (std::int64_t p = 0; p < pairs_in_all; p += kLanes) {
                    Ints rows[kLanes];
                    for (int lane = 0; lane < kLanes; ++lane)
                        rows[lane] = row(smaller(n0 + v * kLanes + lane, args.n - 1), 2 * p);
                    transpose(rows);
                    for (int i = 0; i < smaller(kLanes, pairs_in_all - p); ++i)
                        write(pairs + ((p + i) * vectors + v) * kLanes, rows[i]);
                }
            }
        }

        // Values k .. k + 2 kLanes of row n, zeros behind the last.
        Ints row(std::int64_t n, std::int64_t k) const {
            return read_pairs(args.weight, n * args.weight_stride + k, args.k - k);
        }
    };
};

}  // namespace
}  // namespace klfast
