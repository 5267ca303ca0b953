// OpenMP work split over an explicit number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#include <omp.h>

namespace klfast {

// Calls body(begin, end) on at most n_threads threads with contiguous shares of [0, n), each a multiple
// of `grain` but the last. Which thread does what never changes a result: items are independent. An exception from
// body (out of memory) must not leave the parallel region, which would end the process: it is rethrown after it.
template <class Body>
void parallel_for(std::int64_t n, std::int64_t grain, int n_threads, Body&& body) {
    if (n <= 0) return;
    const std::int64_t chunks = (n + grain - 1) / grain;
    const int threads = static_cast<int>(std::min<std::int64_t>(std::max(n_threads, 1), chunks));
    if (threads == 1) {
        body(std::int64_t{0}, n);
        return;
    }
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
    {
        const std::int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
        const std::int64_t begin = chunks * t / team * grain;
        const std::int64_t end = std::min(n, chunks * (t + 1) / team * grain);
        try {
            if (begin < end) body(begin, end);
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

// Number of threads that pays off for `operations`, at `each` operations per thread (waking one costs about 10 us).
// As doubles: products of sizes may leave the range of integers.
inline int worthwhile_threads(int n_threads, double operations, double each = 500000) {
    return static_cast<int>(std::min<double>(n_threads, 1 + operations / each));
}

}  // namespace klfast
