// Few rows of x: each word is unpacked in registers and meets all rows of x at once. Memory bound for one row.
// Included by the tiers only.
#pragma once

#include "dequant_matmul/exact.h"

namespace klfast {
namespace {

constexpr int kSmallM = 8, kSmallRows = 4;  // rows of x in all, and at a time

// total[r] += scale sum_k x[r, k] (q - z) over one segment. x is multiplied by B^-p beforehand.
template <int Bits, int R>
void add_segment(const Digits<Bits>& digits, const std::int32_t* words, const float* x, std::int64_t x_pitch, std::int64_t begin, std::int64_t end, const Vec (&zero)[Digits<Bits>::placed], Vec scale, Vec* total) {
    constexpr int chains = R == 1 ? 4 : R == 2 ? 2 : 1;  // independent sums hide the latency of the FMA
    Vec sum[R][chains];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < chains; ++c) sum[r][c] = set(0.0f);
    digits.for_values(words, begin, end, zero, [&](std::int64_t k, int p, Vec value) __attribute__((always_inline)) {
        for (int r = 0; r < R; ++r) sum[r][p % chains] = fma(value, set(x[r * x_pitch + k]), sum[r][p % chains]);
    });
    for (int r = 0; r < R; ++r) {
        for (int c = chains / 2; c > 0; c /= 2)
            for (int i = 0; i < c; ++i) sum[r][i] = sum[r][i] + sum[r][i + c];
        total[r] = fma(sum[r][0], scale, total[r]);
    }
}

template <int Bits>
void run_exact_small(const DequantMatmulArgs& a, const Segments& segments) {
    using D = Digits<Bits>;
    const D digits;
    const std::int64_t pitch = round_up_to(a.k, W) + 16;
    Buffer<float> x(a.m * pitch);
    for (std::int64_t m = 0; m < a.m; ++m)
        for (std::int64_t k = 0; k < a.k; k += W)
            store(x.data + m * pitch + k, load(a.x, m * a.x_stride + k, a.x_type, static_cast<int>(smaller(W, a.k - k))) * load(digits.power + k % D::placed));

    parallel_for(a.n, W, useful_threads(a, a.n * a.k), [&](std::int64_t n_begin, std::int64_t n_end) {
        Grid grid(a);
        alignas(64) std::int32_t words[(kBlock / D::count + W) * W];
        for (std::int64_t n0 = n_begin; n0 < n_end; n0 += W) {
            grid.load_panel(a, n0);
            Vec total[kSmallM];
            for (int m = 0; m < a.m; ++m) total[m] = set(0.0f);
            std::int64_t block = -kBlock;
            for (std::int64_t s = 0; s < segments.count; ++s) {
                const Segment seg = segments.list[s];
                if (seg.begin >= block + kBlock) {
                    block = seg.begin;
                    load_words(a, n0, block / D::count, smaller(kBlock / D::count, a.words() - block / D::count), words);
                }
                Vec zero[D::placed];
                digits.zeros(load(grid.zero.data + seg.group * W), zero);
                const Vec scale = load(grid.scale.data + seg.group * W);
                for (int m = 0; m < a.m; m += kSmallRows) {
                    const auto add = [&]<int R>() { add_segment<Bits, R>(digits, words, x.data + m * pitch + block, pitch, seg.begin - block, seg.end - block, zero, scale, total + m); };
                    switch (smaller(kSmallRows, a.m - m)) {
                        case 1: add.template operator()<1>(); break;
                        case 2: add.template operator()<2>(); break;
                        case 3: add.template operator()<3>(); break;
                        default: add.template operator()<4>();
                    }
                }
            }
            for (int m = 0; m < a.m; ++m) store_panel(a, m, n0, total[m]);
        }
    });
}

}  // namespace
}  // namespace klfast
