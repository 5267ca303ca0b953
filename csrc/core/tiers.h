// The instruction-set tiers of core/tiers.def, and which of them this machine can run.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <initializer_list>
#include <string>

namespace klfast {

// `any`: as a limit, that no tier is pinned.
enum class Tier : int {
    any = -1,
#define TIER(name, ...) name,
#include "core/tiers.def"
};

inline constexpr std::array kTierNames{
#define TIER(name, ...) #name,
#include "core/tiers.def"
};
inline constexpr std::size_t kTiers = kTierNames.size();

using TierSet = std::bitset<kTiers>;

// Whether the compiler built a tier: setup.py defines KLFAST_BUILT as the names of those that it did.
#ifndef KLFAST_BUILT
#define KLFAST_BUILT scalar
#endif
constexpr bool is_built(Tier tier) {
    using enum Tier;
    for (const Tier built : {KLFAST_BUILT})
        if (built == tier) return true;
    return false;
}

// Empty when the tier can run here, else one sentence that says why not: not built by the compiler, or what core/cpu.h
// says.
const std::string& why_not(Tier tier);

// Whether a limit lets a tier's kernels run: it is the pinned tier or one that it falls back to, or none is pinned.
bool allows(Tier limit, Tier tier);

// Which of some tiers, of which scalar is one, runs under a limit.
Tier best_tier(const TierSet& tiers, Tier limit);

}  // namespace klfast
