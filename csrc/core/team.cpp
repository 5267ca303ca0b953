#include "core/team.h"

#include <algorithm>
#include <chrono>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace klfast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSpins = 250;                                      // 3 to 10 us, between two looks at the clock
constexpr auto kBetweenYields = std::chrono::microseconds(250);  // where no member is on the same core
constexpr auto kPatience = std::chrono::milliseconds(10);        // two or three turns of another program; then sleep

thread_local Membership current;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

int current_core() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return Team::kUnknown;
#endif
}

}  // namespace

const Membership& membership() { return current; }

void team_detail::join(const Membership& as) { current = as; }

Team::Team(int threads) : size(threads), cores_(threads) {}

void Team::Core::note(int now) {
    if (number.load(std::memory_order_relaxed) != now) number.store(now, std::memory_order_relaxed);
}

void Team::wait() {
    const unsigned round = round_.load(std::memory_order_acquire);
    cores_[current.rank].note(current_core());
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        next_round();
    } else {
        await_end_of(round);
    }
    if (abandoned_.load(std::memory_order_acquire)) throw Abandoned();
}

// Where another program has the core of a member that is late, the member comes back after some milliseconds. Who
// sleeps or yields until then may find its own core taken for just as long, and the two hardly ever meet: so wait
// awake. But a member on the same core comes sooner if asked to, and members that always miss each other get out of
// step by a yield now and then.
void Team::await_end_of(unsigned round) {
    static const int cores = static_cast<int>(std::thread::hardware_concurrency());
    const int spins = size <= cores ? kSpins : 1;
    const auto is_over = [&] {
        for (int i = 0; i < spins; ++i) {
            if (round_.load(std::memory_order_acquire) != round || abandoned_.load(std::memory_order_acquire))
                return true;
            relax();
        }
        return false;
    };
    if (is_over()) return;
    const Clock::time_point begin = Clock::now();
    for (Clock::time_point yielded = begin; !is_over();) {
        const Clock::time_point now = Clock::now();
        if (now - begin > kPatience) return round_.wait(round, std::memory_order_acquire);
        if (size <= cores && !shares_core() && now - yielded < kBetweenYields) continue;
        std::this_thread::yield();
        yielded = Clock::now();
    }
}

bool Team::shares_core() {
    const int own = current_core();
    cores_[current.rank].note(own);
    return own != kUnknown && std::count_if(cores_.begin(), cores_.end(), [&](const Core& core) {
                                  return core.number.load(std::memory_order_relaxed) == own;
                              }) > 1;
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
