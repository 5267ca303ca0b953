#include "core/team.h"

#include <thread>

namespace klfast {
namespace {

constexpr int kSpins = 4000;  // some 50 us; then whoever else wants the core may have it

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
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
        if (abandoned_.load(std::memory_order_acquire)) throw Abandoned();
        if (spins < kSpins)
            relax();
        else
            std::this_thread::yield();
    }
}

}  // namespace klfast
