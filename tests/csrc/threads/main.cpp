// Several threads at a time call all ops, from one thread and in a team each, and run programs of the engine, for
// ThreadSanitizer.
#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

#include "../families.h"
#include "check_program.h"

int main() {
    using namespace klfast::test;
    std::atomic<bool> is_good = true;
    std::vector<std::thread> callers;
    for (const bool in_team : {false, true, true})
        callers.emplace_back([&is_good, in_team] {
            if (in_team) use_team();
            for (const Family& family : kFamilies) family.check();
            if (!check_program() || !report()) is_good = false;
        });
    for (std::thread& caller : callers) caller.join();
    if (!is_good) std::puts("a result is wrong");
    return is_good ? 0 : 1;
}
