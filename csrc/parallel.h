// OpenMP work split over an explicit number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include <omp.h>

namespace klfast {

// Calls body(begin, end) on at most n_threads threads with contiguous shares of [0, n), each a multiple
// of `grain` but the last. Which thread does what never changes a result: items are independent.
template <class Body>
void parallel_for(std::int64_t n, std::int64_t grain, int n_threads, Body&& body) {
    if (n <= 0) return;
    const std::int64_t chunks = (n + grain - 1) / grain;
    const int threads = static_cast<int>(std::min<std::int64_t>(std::max(n_threads, 1), chunks));
    if (threads == 1) {
        body(std::int64_t{0}, n);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const std::int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
        const std::int64_t begin = chunks * t / team * grain;
        const std::int64_t end = std::min(n, chunks * (t + 1) / team * grain);
        if (begin < end) body(begin, end);
    }
}

// Threads worth waking for so many arithmetic operations, each of them with `each` at least: one more costs some 10 us.
inline int worthwhile_threads(int n_threads, std::int64_t operations, std::int64_t each = 500000) {
    return static_cast<int>(std::min<std::int64_t>(n_threads, 1 + operations / each));
}

}  // namespace klfast
