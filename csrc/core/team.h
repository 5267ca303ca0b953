// Threads that go through a whole program side by side. Each runs all of it and, at every parallel_for, takes its share
// and waits for the others there: a loop costs a barrier of spinning threads, not waking them.
#pragma once

#include <atomic>
#include <exception>
#include <vector>

#include <omp.h>

#include "core/denormals.h"

namespace klfast {

class Team {
  public:
    // What wait() throws in a thread whose team another one has left.
    struct Abandoned : std::exception {
        const char* what() const noexcept override { return "another thread of the team failed"; }
    };

    explicit Team(int threads);

    const int size;

    // Returns when all have called it; what they wrote before is then seen by all.
    void wait();

    // Lets the others go, with Abandoned.
    void abandon();

    static constexpr int kUnknown = -1;

  private:
    struct alignas(64) Core {
        std::atomic<int> number = kUnknown;  // the one that a member was seen on last
        void note(int now);                  // writes only what changes: others read it all the time
    };

    void next_round();
    void await_end_of(unsigned round);
    bool shares_core();

    std::vector<Core> cores_;  // by rank
    std::atomic<bool> abandoned_ = false;
    alignas(64) std::atomic<int> arrived_ = 0;
    alignas(64) std::atomic<unsigned> round_ = 0;
};

struct Membership {
    Team* team = nullptr;  // nullptr outside of run_together
    int rank = 0;
};

// The calling thread's.
const Membership& membership();

namespace team_detail {
void join(const Membership& as);
}

// Calls body() in n_threads threads, each a member of one team. What one of them throws is thrown here. In body,
// denormals count as 0.
template <class Body>
void run_together(int n_threads, Body&& body) {
    Team* team = nullptr;
    std::exception_ptr failure;
#pragma omp parallel num_threads(n_threads)
    {
#pragma omp single
        team = new Team(omp_get_num_threads());  // small; a failure here ends the process, as in any parallel region
        team_detail::join({.team = team, .rank = omp_get_thread_num()});
        const FlushedDenormals flushed;
        try {
            body();
        } catch (const Team::Abandoned&) {
        } catch (...) {
            team->abandon();
#pragma omp critical
            if (!failure) failure = std::current_exception();
        }
        team_detail::join({});
    }
    delete team;
    if (failure) std::rethrow_exception(failure);
}

}  // namespace klfast
