// GCC's OpenMP, as far as csrc/ uses it, of std::thread and std::barrier: ThreadSanitizer sees what these order, but
// not what libgomp does.
#include <atomic>
#include <barrier>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

struct Region {
    explicit Region(int threads) : size(threads), barrier(threads) {}
    const int size;
    std::barrier<> barrier;
    std::atomic<int> singles = 0;  // blocks of which some thread is the one that runs them
};

struct Place {
    Region* region = nullptr;
    int rank = 0, singles = 0;  // singles: that this thread has come to
};

thread_local Place place;
std::mutex critical;

void run(void (*body)(void*), void* data, Region& region, int rank) {
    const Place before = std::exchange(place, {.region = &region, .rank = rank});
    body(data);
    place = before;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    Region region(static_cast<int>(threads));
    std::vector<std::thread> others;
    for (int rank = 1; rank < region.size; ++rank) others.emplace_back([&, rank] { run(body, data, region, rank); });
    run(body, data, region, 0);
    for (std::thread& other : others) other.join();
}

void GOMP_barrier() { place.region->barrier.arrive_and_wait(); }

bool GOMP_single_start() {
    int expected = place.singles++;
    return place.region->singles.compare_exchange_strong(expected, expected + 1, std::memory_order_relaxed);
}

void GOMP_critical_start() { critical.lock(); }

void GOMP_critical_end() { critical.unlock(); }

int omp_get_thread_num() { return place.rank; }

int omp_get_num_threads() { return place.region ? place.region->size : 1; }

}  // extern "C"
