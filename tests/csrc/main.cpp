// The kernels without Python: checks the named families, all by default, at every tier of this machine.
#include <cstring>

#include "families.h"

int main(int count, char** arguments) {
    using namespace klfast::test;
    for (const Family& family : kFamilies) {
        bool wanted = count == 1;
        for (int i = 1; i < count; ++i) wanted = wanted || std::strcmp(arguments[i], family.name) == 0;
        if (wanted) family.check();
    }
    return report() ? 0 : 1;
}
