// linear with few rows of x: W row by row as it lies, lanes along k, read once from front to back; bound by memory.
// Included by the tiers only.
//
// `Terms` says what a vector of a row of W holds:
//     values, size              how many, and of how many bytes
//     arrange(args, i, n, out)  n values of x from index i on, zeros behind them, as they meet those of W
//     read(weight, i, n)        n values from index i on, zeros behind them
//     add(sum, weight, x)       sum + weight x, lane by lane
#pragma once

#include "matmul/dense/linear.h"
#include "gemm/common.h"

namespace klfast {
namespace {

constexpr std::int64_t kStepsOfPart = 256;  // are added up before they join the whole sum: a long one rounds more

template <class Terms>
struct DenseFewRows {
    const LinearArgs& a;
    const std::int64_t steps = (a.k + Terms::values - 1) / Terms::values, pitch = steps * kLanes;
    Buffer<std::int32_t> x;  // [m, steps, kLanes]

    explicit DenseFewRows(const LinearArgs& args) : a(args), x(args.m * pitch) {
        for (std::int64_t m = 0; m < a.m; ++m)
            for (std::int64_t s = 0; s < steps; ++s)
                Terms::arrange(a, m * a.x_stride + s * Terms::values, smaller(Terms::values, a.k - s * Terms::values),
                               x.data + m * pitch + s * kLanes);
    }

    // y[.., n .. n + R] for all M rows of x
    template <int R, int M>
    void tile(std::int64_t n) const {
        const std::int64_t whole = a.k / Terms::values, stride = a.weight_stride, x_pitch = pitch, base = n * stride;
        const void* const weight = a.weight;
        const char* const ahead = static_cast<const char*>(weight) + base * Terms::size + kAhead;
        // In the order in which vectors lie, if one row follows another: docs/KERNEL_NOTES.md.
        const std::int64_t next_row = stride == a.k ? Terms::values : stride,
                           next_step = stride == a.k ? R * Terms::values : Terms::values;
        const std::int32_t* const row_x = x.data;
        using Sums = Vec[M][R];
        const auto clear = [](Sums& sums) KLFAST_INLINE {
            unrolled<M>([&](int m)
                            KLFAST_INLINE { unrolled<R>([&](int r) KLFAST_INLINE { sums[m][r] = set(0.0f); }); });
        };
        const auto add = [&](Sums& sums, std::int64_t s, int valid) KLFAST_INLINE {
            unrolled<R>([&](int r) KLFAST_INLINE {
                const auto w = Terms::read(weight, base + r * stride + s * Terms::values, valid);
                unrolled<M>([&](int m) KLFAST_INLINE {
                    sums[m][r] = Terms::add(sums[m][r], w, row_x + m * x_pitch + s * kLanes);
                });
            });
        };
        Sums total;
        clear(total);
        for (std::int64_t begin = 0; begin < whole; begin += kStepsOfPart) {
            Sums part;
            clear(part);
            for (std::int64_t s = begin; s < smaller(begin + kStepsOfPart, whole); ++s) {
                for (int r = 0; r < R; ++r)
                    __builtin_prefetch(ahead + (r * next_row + s * next_step) * Terms::size, 0, 3);
                add(part, s, Terms::values);
            }
            unrolled<M>([&](int m) KLFAST_INLINE {
                unrolled<R>([&](int r) KLFAST_INLINE { total[m][r] = total[m][r] + part[m][r]; });
            });
        }
        if (whole < steps) add(total, whole, static_cast<int>(a.k - whole * Terms::values));
        unrolled<M>([&](int m) KLFAST_INLINE {
            unrolled<R>([&](int r) KLFAST_INLINE { store_columns(a, m, n + r, 1, set(sum(total[m][r]))); });
        });
    }

    template <int M = kFewRows>
    void run() const {
        if constexpr (M > 1)
            if (a.m < M) return run<M - 1>();
        constexpr int R = M <= 4 ? 4 : 2;  // rows of W at a time: at most 16 sums
        parallel_for(a.n, R, useful_threads(a, 1.0 * a.n * a.k), [&](std::int64_t begin, std::int64_t end) {
            std::int64_t n = begin;
            for (; n + R <= end; n += R) tile<R, M>(n);
            for (; n < end; ++n) tile<1, M>(n);
        });
    }
};

// Floats, converted one vector at a time.
template <DType T>
struct FloatTerms {
    static constexpr int values = kLanes, size = T == DType::f32 ? 4 : 2;

    static void arrange(const LinearArgs& a, std::int64_t i, std::int64_t n, std::int32_t* out) {
        write(out, bits_of(load(a.x, i, a.x_type, static_cast<int>(n))));
    }
    static Vec read(const void* weight, std::int64_t i, int n) { return load(weight, i, T, n); }
    static Vec add(Vec sum, Vec weight, const std::int32_t* x) { return fma(weight, float_bits(klfast::read(x)), sum); }
};

inline void few_rows(const LinearArgs& a) {
    switch (a.weight_type) {
        case DType::f32: return DenseFewRows<FloatTerms<DType::f32>>(a).run();
        case DType::f16: return DenseFewRows<FloatTerms<DType::f16>>(a).run();
        case DType::bf16: return DenseFewRows<FloatTerms<DType::bf16>>(a).run();
    }
}

}  // namespace
}  // namespace klfast
