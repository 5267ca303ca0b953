#include "core/kernel_table.h"

namespace klfast {

std::map<std::string, TierSet>& op_tiers() {
    static std::map<std::string, TierSet> ops;  // in a function: made before its first user
    return ops;
}

}  // namespace klfast
