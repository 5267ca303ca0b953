// How an op finds its kernels. The op's tiers.cpp names the tiers that it has kernels for,
//     #define KLFAST_TIERS scalar, avx2, avx512vnni
// and setup.py compiles that file once for each (KLFAST_TIER is then its name), where it defines the kernel in the
// tier's namespace, and once without, where KLFAST_DISPATCH makes the table of them. The table is constant data:
// nothing of a tier runs before the CPU is known to have its instructions, as code that registers kernels would.
#pragma once

#include <array>
#include <initializer_list>
#include <map>
#include <string>
#include <type_traits>

#include "core/tiers.h"

namespace klfast {

// An op's kernels by tier, nullptr where there is none. Every op has a scalar kernel.
template <class Kernel>
class KernelTable {
  public:
    struct Entry {
        Tier tier;
        bool is_built;
        Kernel* kernel;  // nullptr unless built
    };

    constexpr KernelTable(std::initializer_list<Entry> entries) {
        bool has_scalar = false;  // under sanitizers the address of a function cannot be compared at compile time
        for (const Entry& entry : entries) {
            kernels_[static_cast<int>(entry.tier)] = entry.kernel;
            has_scalar |= entry.tier == Tier::scalar && entry.is_built;
        }
        if (!has_scalar) throw "an op needs a scalar kernel";  // at compile time
    }

    constexpr Kernel* operator[](Tier tier) const { return kernels_[static_cast<int>(tier)]; }

    TierSet tiers() const {
        TierSet tiers;
        for (std::size_t t = 0; t < kTiers; ++t) tiers[t] = kernels_[t] != nullptr;
        return tiers;
    }

  private:
    std::array<Kernel*, kTiers> kernels_{};
};

// The kernel that runs under each limit, so that a call does not look for it.
template <class Kernel>
class KernelChoice {
  public:
    explicit KernelChoice(const KernelTable<Kernel>& table) {
        for (int limit = static_cast<int>(Tier::any); limit < static_cast<int>(kTiers); ++limit)
            best_[limit + 1] = table[best_tier(table.tiers(), static_cast<Tier>(limit))];
    }

    Kernel* operator[](Tier limit) const { return best_[static_cast<int>(limit) + 1]; }

  private:
    std::array<Kernel*, kTiers + 1> best_;
};

// Op -> the tiers that it has kernels for, for klfast.explain.
std::map<std::string, TierSet>& op_tiers();

// Adds an op to them. One beside each table.
struct Announce {
    template <class Kernel>
    Announce(const char* op, const KernelTable<Kernel>& table) {
        op_tiers()[op] = table.tiers();
    }
};

}  // namespace klfast

// For an op's tiers.cpp. Declares the kernels op(args) in the namespaces of KLFAST_TIERS, makes a table of them, `k_`
// and the op's name, and defines op(args, limit), which calls the best.
#define KLFAST_DISPATCH(op, Args)                      \
    KLFAST_KERNEL_TABLE(k_##op, op, void(const Args&)) \
    const Announce announce_##op{#op, k_##op};         \
    void op(const Args& args, Tier limit) {            \
        static const KernelChoice best(k_##op);        \
        best[limit](args);                             \
    }

// The table alone; `Kernel` is the type of what has that name in the namespace of each tier.
#define KLFAST_KERNEL_TABLE(table, name, Kernel)          \
    KLFAST_FOR_TIERS(KLFAST_DECLARE_KERNEL, name, Kernel) \
    constexpr KernelTable<Kernel> table{KLFAST_FOR_TIERS(KLFAST_KERNEL_ENTRY, name, Kernel)};
#define KLFAST_DECLARE_KERNEL(in, name, Kernel) \
    namespace in {                              \
    extern std::type_identity_t<Kernel> name;   \
    }
#define KLFAST_KERNEL_ENTRY(in, name, Kernel) \
    KernelTable<Kernel>::Entry{               \
        .tier = Tier::in, .is_built = is_built(Tier::in), .kernel = is_built(Tier::in) ? &in::name : nullptr},

// macro(tier, name, Kernel) for each of KLFAST_TIERS. No macro can name itself, so each turn leaves the next one's name
// to another scan, of which there are 27.
#define KLFAST_FOR_TIERS(macro, name, Kernel) KLFAST_SCAN(KLFAST_TURN(macro, name, Kernel, KLFAST_TIERS))
#define KLFAST_TURN(...) KLFAST_FOR_FIRST(__VA_ARGS__)
#define KLFAST_FOR_FIRST(macro, name, Kernel, tier, ...) \
    macro(tier, name, Kernel) __VA_OPT__(KLFAST_NEXT KLFAST_NOTHING()()(macro, name, Kernel, __VA_ARGS__))
#define KLFAST_NEXT() KLFAST_FOR_FIRST
#define KLFAST_NOTHING()
#define KLFAST_SCAN(...) KLFAST_SCAN_9(KLFAST_SCAN_9(KLFAST_SCAN_9(__VA_ARGS__)))
#define KLFAST_SCAN_9(...) KLFAST_SCAN_3(KLFAST_SCAN_3(KLFAST_SCAN_3(__VA_ARGS__)))
#define KLFAST_SCAN_3(...) KLFAST_SCAN_1(KLFAST_SCAN_1(KLFAST_SCAN_1(__VA_ARGS__)))
#define KLFAST_SCAN_1(...) __VA_ARGS__
