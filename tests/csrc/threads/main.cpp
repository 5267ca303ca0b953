// Two threads at a time run programs of the engine and call all ops, one of them in teams, for ThreadSanitizer.
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
    for (const bool in_team : {false, true})
        callers.emplace_back([&is_good, in_team] {
            if (!check_program()) is_good = false;
            if (in_team) use_team();
            for (const Family& family : kFamilies) family.check();
            if (!report()) is_good = false;
        });
    for (std::thread& caller : callers) caller.join();
    if (!is_good) std::puts("a result is wrong");
    return is_good ? 0 : 1;
}
