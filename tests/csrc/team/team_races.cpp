// Members of a team share loops; ThreadSanitizer sees any access that the barriers leave unordered. Threads are not
// OpenMP's, which it does not understand.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/parallel.h"

using klfast::Team;

namespace {

constexpr int kRounds = 2000, kItems = 7;

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

template <class Body>
void in_team(int size, Body&& body) {
    Team team(size);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank)
        threads.emplace_back([&, rank] {
            klfast::team_detail::join({.team = &team, .rank = rank});
            body(team, rank);
        });
    for (std::thread& thread : threads) thread.join();
}

void check(int size) {
    std::vector<long> values(kItems);
    in_team(size, [&](Team&, int) {
        for (long round = 1; round <= kRounds; ++round) {
            klfast::parallel_for(kItems, 1, 1, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) values[i] = round * i;
            });
            long sum = 0;
            for (const long value : values) sum += value;
            require(sum == round * kItems * (kItems - 1) / 2, "a member went on before the others had written");
            klfast::parallel_for(1, 1, 1, [&](std::int64_t, std::int64_t) {});  // all have read
        }
    });
    std::atomic<int> left = 0;
    in_team(size, [&](Team& team, int rank) {
        if (rank == 1) return team.abandon();
        try {
            for (;;) team.wait();
        } catch (const Team::Abandoned&) {
            ++left;
        }
    });
    require(left == size - 1, "a member did not leave an abandoned team");
}

}  // namespace

int main() {
    for (const int size : {2, 3, 5}) check(size);  // members wait awake where they are no more than cores
    return 0;
}
