// Per-token comparison of two next-token distributions: every metric of klfast.Divergence in one pass over the two
// rows of logits, whole or in blocks of columns. The algebra is in token_state.h, the vector loops are in
// vector_loops.h.
#pragma once

#include <cstdint>

#include "core/tiers.h"
#include "divergence/token_state.h"
#include "core/dtype.h"

namespace klfast::divergence {

struct Matrix {
    const void* data;
    DType dtype;
    std::int64_t row_stride, column_stride;  // in elements
};

// A block of columns of T rows. `targets` may be null; any target outside the block is left alone.
struct BlockArgs {
    Matrix teacher, student;
    std::int64_t tokens, columns;
    std::int64_t first_column;    // of the block, in the vocabulary
    const std::int64_t* targets;  // [T], vocabulary indices
    State* states;                // [T]; all-zero bytes are a fresh state
    int n_threads;
};

// Add a block to each token's state.
void accumulate(const BlockArgs& args, Tier limit);

// Metrics of finished states, out float [8, T], and their faults. A token whose anchor was too far off, or whose logits
// are wide, is not finished: its state is prepared for another run and rerun[t] set, and the whole row is to be
// accumulated again. Returns how many are.
std::int64_t finish(State* states, std::int64_t tokens, std::int64_t vocab, float* out, Fault* fault, bool* rerun);

// Both at once, rows whole: out float [8, T], fault [T].
void logit_divergence(const BlockArgs& args, float* out, Fault* fault, Tier limit);

// What a GPU kernel leaves of a part of a row's vocabulary, floats in this order (kernels/triton/divergence_terms.py).
struct Part {
    float mu[kMoments], k1, k2, j, q, sum_a2, sum_d2, max_a, max_b;
    float reference;  // R
};
struct PartIndex {
    std::int32_t argmax_a, argmax_b;
};
struct PartsArgs {
    const Part* parts;       // [T, n_parts]
    const PartIndex* index;  // [T, n_parts]
    std::int64_t tokens, n_parts, vocab;
    const double* targets;  // [T, 2], both models' logits of the targets, NaN where there is none; may be null
    float* anchor;          // [T], the parts' anchors; where another run is needed, the next
    std::int64_t* runs;     // [T], how many there were before
    int n_threads;
};
enum class Verdict : std::int8_t {
    done,
    again,  // with the anchor now given
    wide,   // not finite, or too large for the kernels: to be compared by logit_divergence
};

// Metrics of rows that a GPU kernel has summed, out float [8, T], and what has become of each row.
void from_parts(const PartsArgs& args, float* out, Verdict* verdict);

// What a tier provides; a and b are n >= 1 floats of a teacher's and a student's row.
struct Scan {
    float max_a, max_b, min_d, max_d;  // d = b - a
    double sum_a2, sum_d2;             // not finite if any logit is not, or its square
};
struct Kernels {
    void (*scan)(const float* a, const float* b, int n, Scan& out);
    // For |d - anchor| <= kWide; wide_sums for any d, of shifted logits.
    void (*sums)(const float* a, const float* b, int n, float anchor, float reference, Sums& out);
    void (*wide_sums)(const float* a, const float* b, int n, float anchor, float reference, Sums& out);
    // For |d - anchor| <= largest <= kSmall.
    void (*moments)(const float* a, const float* b, int n, float anchor, float reference, float largest, Moments& out);
    // For |d - anchor| <= kWide.
    void (*powers)(const float* a, const float* b, int n, float anchor, float reference, Powers& out);
    void (*widen)(const void* from, DType dtype, int n, float* to);
};

// The best that a limit allows.
const Kernels& best_kernels(Tier limit);

}  // namespace klfast::divergence
