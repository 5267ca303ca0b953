// The small matrix product inside the chunked scan, over Vec: C += A B with operands in L1 or L2.
#pragma once

#include <cstdint>

#include "simd/tile_io.h"

namespace klfast {
namespace {

constexpr int kRows = 6, kVecs = kLanes == 16 ? 4 : 2;  // accumulators: 24 of 32 zmm, 12 of 16 ymm

// R rows by V vectors: c[r, :] = alpha c[r, :] + sum_k a[r a_row + k a_step] b[k, :], k < depth, or if `Causal` k <
// depth + r.
template <int R, int V, bool Causal>
void gemm_block(std::int64_t depth, float alpha, const float* a, std::int64_t a_row, std::int64_t a_step,
                const float* b, std::int64_t b_pitch, float* c, std::int64_t c_pitch) {
    Vec acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = set(alpha) * load(c + r * c_pitch + v * kLanes);
    for (std::int64_t k = 0; k < depth; ++k) {
        Vec row[V];
        for (int v = 0; v < V; ++v) row[v] = load(b + k * b_pitch + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec left = set(a[r * a_row + k * a_step]);
            for (int v = 0; v < V; ++v) acc[r][v] = fma(left, row[v], acc[r][v]);
        }
    }
    if constexpr (Causal) {
#pragma GCC unroll 8
        for (int k = 0; k + 1 < R; ++k) {
            Vec row[V];
            for (int v = 0; v < V; ++v) row[v] = load(b + (depth + k) * b_pitch + v * kLanes);
            for (int r = k + 1; r < R; ++r) {
                const Vec left = set(a[r * a_row + (depth + k) * a_step]);
                for (int v = 0; v < V; ++v) acc[r][v] = fma(left, row[v], acc[r][v]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c + r * c_pitch + v * kLanes, acc[r][v]);
}

template <int R, bool Causal>
void gemm_rows(std::int64_t columns, std::int64_t depth, float alpha, const float* a, std::int64_t a_row,
               std::int64_t a_step, const float* b, std::int64_t b_pitch, float* c, std::int64_t c_pitch) {
    std::int64_t j = 0;
    for (; j + kVecs * kLanes <= columns; j += kVecs * kLanes)
        gemm_block<R, kVecs, Causal>(depth, alpha, a, a_row, a_step, b + j, b_pitch, c + j, c_pitch);
    for (; j < columns; j += kLanes)
        gemm_block<R, 1, Causal>(depth, alpha, a, a_row, a_step, b + j, b_pitch, c + j, c_pitch);
}

// c[i, :] = alpha c[i, :] + sum_k a[i a_row + k a_step] b[k, :] for i < rows. columns is a multiple of the vector
// width. If `Causal`, row i has depth i + 1 instead: what lies above A's diagonal is not read, and meets no infinity of
// B.
template <bool Causal = false>
void gemm(std::int64_t rows, std::int64_t columns, std::int64_t depth, float alpha, const float* a, std::int64_t a_row,
          std::int64_t a_step, const float* b, std::int64_t b_pitch, float* c, std::int64_t c_pitch) {
    std::int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
        gemm_rows<kRows, Causal>(columns, Causal ? i + 1 : depth, alpha, a + i * a_row, a_row, a_step, b, b_pitch,
                                 c + i * c_pitch, c_pitch);
    for (; i < rows; ++i)
        gemm_rows<1, Causal>(columns, Causal ? i + 1 : depth, alpha, a + i * a_row, a_row, a_step, b, b_pitch,
                             c + i * c_pitch, c_pitch);
}

}  // namespace
}  // namespace klfast
