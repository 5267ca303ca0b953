#include "core/team.h"

#include <thread>

namespace klfast {
namespace {

constexpr int kSpins = 4000, kYields = 50;  // some 50 us; then whoever else wants the core may have it

thread_local Membership current;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

}  // namespace

const Membership& membership() { return current; }

void team_detail::join(const Membership& as) { current = as; }

void Team::wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        next_round();
        return;
    }
    static const int cores = static_cast<int>(std::thread::hardware_concurrency());
    const int spins = size <= cores ? kSpins : 0;
    for (int turn = 0; round_.load(std::memory_order_acquire) == round; ++turn) {
        if (abandoned_.load(std::memory_order_acquire)) throw Abandoned();
        if (turn < spins)
            relax();
        else if (turn < spins + kYields)
            std::this_thread::yield();
        else
            round_.wait(round, std::memory_order_acquire);
    }
    if (abandoned_.load(std::memory_order_acquire)) throw Abandoned();
}

void Team::abandon() {
    abandoned_.store(true, std::memory_order_release);
    next_round();
}

void Team::next_round() {
    round_.fetch_add(1, std::memory_order_acq_rel);
    round_.notify_all();
}

}  // namespace klfast
