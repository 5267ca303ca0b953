#include "core/tiers.h"

#include <algorithm>
#include <vector>

#include "core/cpu.h"

namespace klfast {
namespace {

using Order = std::vector<Tier>;

const std::array<Order, kTiers>& fallbacks() {
    using enum Tier;
#define FALLS_BACK_TO(...) {__VA_ARGS__}
#define TIER(name, falls_back_to, needs) Order falls_back_to,
    static const std::array<Order, kTiers> all{
#include "core/tiers.def"
    };
#undef FALLS_BACK_TO
    return all;
}

void add(Order& order, Tier tier) {
    if (std::find(order.begin(), order.end(), tier) != order.end()) return;
    order.push_back(tier);
    for (const Tier next : fallbacks()[static_cast<int>(tier)]) add(order, next);
}

// The tiers that a limit allows, the best first.
Order order_under(Tier limit) {
    Order order;
    if (limit != Tier::any) {
        add(order, limit);
    } else {
        for (int t = static_cast<int>(kTiers) - 1; t >= 0; --t) order.push_back(static_cast<Tier>(t));
    }
    return order;
}

std::array<std::string, kTiers> all_reasons() {
    using namespace cpu;
#define NEEDS(...) {__VA_ARGS__}
#define TIER(name, falls_back_to, needs) cpu::why_not(needs),
    std::array<std::string, kTiers> reasons{
#include "core/tiers.def"
    };
#undef NEEDS
    for (std::size_t t = 0; t < kTiers; ++t)
        if (reasons[t].empty() && !is_built(static_cast<Tier>(t)))
            reasons[t] = "the compiler that built klfast could not build it.";
    return reasons;
}

}  // namespace

const std::string& why_not(Tier tier) {
    static const std::array<std::string, kTiers> reasons = all_reasons();
    return reasons[static_cast<int>(tier)];
}

bool allows(Tier limit, Tier tier) {
    const Order order = order_under(limit);
    return std::find(order.begin(), order.end(), tier) != order.end();
}

Tier best_tier(const TierSet& tiers, Tier limit) {
    for (const Tier tier : order_under(limit))
        if (tiers[static_cast<int>(tier)] && why_not(tier).empty()) return tier;
    return Tier::scalar;
}

}  // namespace klfast
