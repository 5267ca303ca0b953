// Work split over an explicit number of OpenMP threads, or over the team that the calling thread belongs to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#include <omp.h>

#include "core/denormals.h"
#include "core/team.h"

namespace klfast {

// Calls body(begin, end) on at most n_threads threads with contiguous shares of [0, n), each a multiple
// of `grain` but the last. Which thread does what never changes a result: items are independent. An exception from
// body (out of memory) must not leave the parallel region, which would end the process: it is rethrown after it. In
// body, denormals count as 0.
//
// In a team (core/team.h) every member calls this, with a copy of its own of what is local to the caller; so body must
// write what all of them share, and scratch is filled by prepare_for.
template <class Body>
void parallel_for(std::int64_t n, std::int64_t grain, int n_threads, Body&& body) {
    if (n <= 0) return;
    const std::int64_t chunks = (n + grain - 1) / grain;
    const auto share = [&](std::int64_t rank, std::int64_t team) __attribute__((noinline)) {  // body's code once
        const std::int64_t begin = chunks * rank / team * grain, end = std::min(n, chunks * (rank + 1) / team * grain);
        if (begin < end) body(begin, end);
    };
    if (const Membership& own = membership(); own.team != nullptr) {
        share(own.rank, own.team->size);
        own.team->wait();
        return;
    }
    const int threads = static_cast<int>(std::min<std::int64_t>(std::max(n_threads, 1), chunks));
    if (threads == 1) {
        const FlushedDenormals flushed;
        return share(0, 1);
    }
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads)
    {
        const FlushedDenormals flushed;
        try {
            share(omp_get_thread_num(), omp_get_num_threads());
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

// The same for a body that fills what is local to the caller: each member of a team fills all of its own.
template <class Body>
void prepare_for(std::int64_t n, std::int64_t grain, int n_threads, Body&& body) {
    if (membership().team == nullptr) return parallel_for(n, grain, n_threads, body);
    if (n > 0) body(std::int64_t{0}, n);
}

// Number of threads that pays off for `operations`, at `each` operations per thread (waking one costs about 10 us).
// As doubles: products of sizes may leave the range of integers.
inline int worthwhile_threads(int n_threads, double operations, double each = 500000) {
    return static_cast<int>(std::min<double>(n_threads, 1 + operations / each));
}

}  // namespace klfast
