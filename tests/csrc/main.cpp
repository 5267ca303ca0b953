// The kernels without Python: checks the named families at the named tiers of this machine, all by default.
#include <set>
#include <string>

#include "check.h"
#include "families.h"

int main(int count, char** arguments) {
    using namespace klfast::test;
    std::set<std::string> names(arguments + 1, arguments + count);
    for (const char* const tier : klfast::kTierNames)
        if (names.erase(tier) != 0) only_tiers().insert(tier);
    for (const Family& family : kFamilies)
        if (names.empty() || names.contains(family.name)) family.check();
    return report() ? 0 : 1;
}
