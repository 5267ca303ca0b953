// Loops of a constant number of turns, written out.
#pragma once

namespace klfast {
namespace {

// body(0) .. body(N - 1). Where a loop indexes an array of vectors, the compiler may unroll it too late to keep the
// array in registers, and store every element at every turn.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(const Body& body) {
    if constexpr (N > 0) {
        unrolled<N - 1>(body);
        body(N - 1);
    }
}

#define KLFAST_INLINE __attribute__((always_inline))  // for the bodies

}  // namespace
}  // namespace klfast
