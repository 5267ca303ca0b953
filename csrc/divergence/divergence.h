// Per-token comparison of two next-token distributions: every metric of klfast.Divergence in one pass over the two
// rows of logits, whole or in blocks of columns. The algebra is in state.h, the vector loops are in sums.h.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "divergence/state.h"
#include "numeric.h"

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
    std::int64_t first_column;     // of the block, in the vocabulary
    const std::int64_t* targets;   // [T], vocabulary indices
    State* states;                 // [T]; all-zero bytes are a fresh state
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

// What a tier provides; a and b are n >= 1 floats of a teacher's and a student's row.
struct Scan {
    float max_a, max_b, min_d, max_d;  // d = b - a
    double sum_a2, sum_d2;             // not finite if any logit is not, or its square
};
struct Kernels {
    void (*scan)(const float* a, const float* b, int n, Scan& out);
    void (*sums)(const float* a, const float* b, int n, float anchor, float reference, Sums& out);       // |d - anchor| <= kWide
    void (*wide_sums)(const float* a, const float* b, int n, float anchor, float reference, Sums& out);  // any d; of shifted logits
    void (*moments)(const float* a, const float* b, int n, float anchor, float reference, float largest, Moments& out);  // |d - anchor| <= largest <= kSmall
    void (*widen)(const void* from, DType dtype, int n, float* to);
};

}  // namespace klfast::divergence

namespace klfast::scalar { extern const divergence::Kernels kDivergence; }
namespace klfast::avx2 { extern const divergence::Kernels kDivergence; }
namespace klfast::avx512vnni { extern const divergence::Kernels kDivergence; }
