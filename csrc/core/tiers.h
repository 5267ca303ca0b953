// Which instruction-set tiers this machine can run, and why not the others.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <map>
#include <set>
#include <string>

namespace klfast {

// Ascending: a machine that runs a tier runs an op's kernel of any lower one that it can run.
enum class Tier : int { scalar, avx2, avxvnni, avx512vnni, avx512bf16, amx };
inline constexpr std::size_t kTiers = 6;
inline constexpr std::array<const char*, kTiers> kTierNames{"scalar",     "avx2",       "avxvnni",
                                                            "avx512vnni", "avx512bf16", "amx"};

// Empty when the tier can run here, else one sentence that says why not: not built by the compiler,
// not in CPUID, its registers not saved by the OS (XCR0), or tile permission not granted (AMX).
const std::string& why_not(Tier tier);

// An op's kernels by tier, nullptr where it has none: one entry for each tier, or it does not compile. Every op has a
// scalar kernel.
template <class Fn>
struct KernelTable {
    std::array<Fn*, kTiers> kernels;

    template <class... Kernels>
    constexpr KernelTable(Kernels... of_tiers) : kernels{of_tiers...} {
        static_assert(sizeof...(Kernels) == kTiers,
                      "a kernel table has one entry for each tier, nullptr where there is none");
    }
    constexpr Fn* operator[](std::size_t tier) const { return kernels[tier]; }
};

// The best tier not above `limit` that the op has and the machine runs.
template <class Fn>
Tier best_tier(const KernelTable<Fn>& table, Tier limit) {
    for (int t = static_cast<int>(limit); t > 0; --t)
        if (table[t] != nullptr && why_not(static_cast<Tier>(t)).empty()) return static_cast<Tier>(t);
    return Tier::scalar;
}

template <class Fn>
Fn* pick(const KernelTable<Fn>& table, Tier limit) {
    return table[static_cast<int>(best_tier(table, limit))];
}

// Tells klfast.explain which tiers an op has kernels for, and which of them pick takes. One beside each kernel table:
//     const Announce announce{"dequant_matmul", kKernels};
struct Announce {
    template <class Fn>
    Announce(const char* op, const KernelTable<Fn>& table) {
        for (std::size_t t = 0; t < kTiers; ++t)
            if (table[t] != nullptr) announced()[op].insert(kTierNames[t]);
        best()[op] = [&table](Tier limit) { return best_tier(table, limit); };
    }
    // Op -> names of its tiers.
    static std::map<std::string, std::set<std::string>>& announced();
    // Op -> the tier that pick takes under a limit.
    static std::map<std::string, std::function<Tier(Tier)>>& best();
};

}  // namespace klfast

// KLFAST_IF_<TIER>(f): the kernel where the compiler built its tier, nullptr elsewhere; for kernel tables.
#ifdef KLFAST_BUILT_AVX2
#define KLFAST_IF_AVX2(f) (f)
#else
#define KLFAST_IF_AVX2(f) nullptr
#endif
#ifdef KLFAST_BUILT_AVXVNNI
#define KLFAST_IF_AVXVNNI(f) (f)
#else
#define KLFAST_IF_AVXVNNI(f) nullptr
#endif
#ifdef KLFAST_BUILT_AVX512VNNI
#define KLFAST_IF_AVX512VNNI(f) (f)
#else
#define KLFAST_IF_AVX512VNNI(f) nullptr
#endif
#ifdef KLFAST_BUILT_AVX512BF16
#define KLFAST_IF_AVX512BF16(f) (f)
#else
#define KLFAST_IF_AVX512BF16(f) nullptr
#endif
#ifdef KLFAST_BUILT_AMX
#define KLFAST_IF_AMX(f) (f)
#else
#define KLFAST_IF_AMX(f) nullptr
#endif
