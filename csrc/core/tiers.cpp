// CPUID leaves and XCR0 bits: Intel SDM volume 1, chapter 13, and volume 2A, CPUID; AMX permission:
// Linux Documentation/arch/x86/xstate.rst.
#include "core/tiers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace klfast {
namespace {

#if defined(__x86_64__)

struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    Leaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int i) { return (word >> i) & 1u; }

unsigned long long saved_registers() {
    if (!bit(Leaf(1, 0).ecx, 27)) return 0;  // OSXSAVE
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (static_cast<unsigned long long>(hi) << 32) | lo;
}

constexpr unsigned long long kSaveAvx = 0x6, kSaveAvx512 = 0xe6, kSaveTiles = 0x60000;

std::string missing(const char* feature) { return std::string("this CPU has no ") + feature + "."; }

std::string check_avx2() {
    const Leaf one(1, 0), seven(7, 0);
    if (!bit(one.ecx, 28)) return missing("AVX");
    if (!bit(one.ecx, 12)) return missing("FMA");
    if (!bit(one.ecx, 29)) return missing("F16C");
    if (!bit(seven.ebx, 5)) return missing("AVX2");
    if (!bit(seven.ebx, 8)) return missing("BMI2");
    if ((saved_registers() & kSaveAvx) != kSaveAvx) return "the operating system does not save the AVX registers.";
    return {};
}

std::string check_avxvnni() {
    if (auto reason = check_avx2(); !reason.empty()) return reason;
#ifdef KLFAST_AVXVNNI_TWIN
    const Leaf seven(7, 0);
    if (!bit(seven.ebx, 31) || !bit(seven.ecx, 11)) return missing("AVX-512-VNNI to stand in for AVX-VNNI");
    if ((saved_registers() & kSaveAvx512) != kSaveAvx512)
        return "the operating system does not save the AVX-512 registers.";
#else
    if (!bit(Leaf(7, 1).eax, 4)) return missing("AVX-VNNI");
#endif
    return {};
}

std::string check_avx512vnni() {
    if (auto reason = check_avx2(); !reason.empty()) return reason;
    const Leaf seven(7, 0);
    if (!bit(seven.ebx, 16)) return missing("AVX-512F");
    if (!bit(seven.ebx, 17)) return missing("AVX-512DQ");
    if (!bit(seven.ebx, 30)) return missing("AVX-512BW");
    if (!bit(seven.ebx, 31)) return missing("AVX-512VL");
    if (!bit(seven.ecx, 11)) return missing("AVX-512-VNNI");
    if ((saved_registers() & kSaveAvx512) != kSaveAvx512)
        return "the operating system does not save the AVX-512 registers.";
    return {};
}

std::string check_avx512bf16() {
    if (auto reason = check_avx512vnni(); !reason.empty()) return reason;
    if (!bit(Leaf(7, 1).eax, 5)) return missing("AVX-512-BF16");
    return {};
}

std::string check_amx() {
    if (auto reason = check_avx512bf16(); !reason.empty()) return reason;
#ifdef KLFAST_AMX_TWIN
    return {};  // tiles are modelled
#else
    const Leaf seven(7, 0);
    if (!bit(seven.edx, 24)) return missing("AMX-TILE");
    if (!bit(seven.edx, 25)) return missing("AMX-INT8");
    if (!bit(seven.edx, 22)) return missing("AMX-BF16");
    if ((saved_registers() & kSaveTiles) != kSaveTiles) return "the operating system does not save the AMX tiles.";
#if defined(__linux__)
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
    if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) != 0)
        return "the kernel refused this process the permission to use AMX tiles.";
    return {};
#else
    return "AMX needs Linux's permission call, and this is not Linux.";
#endif
#endif  // KLFAST_AMX_TWIN
}

#endif  // __x86_64__

std::array<std::string, kTiers> all_reasons() {
    std::array<std::string, kTiers> reasons;
#if defined(__x86_64__)
    reasons = {"", check_avx2(), check_avxvnni(), check_avx512vnni(), check_avx512bf16(), check_amx()};
#else
    for (std::size_t t = 1; t < kTiers; ++t) reasons[t] = "this is not an x86-64 machine.";
#endif
    static const int yes = 1;  // any address: the macros give it back where the tier was built
    const std::array<const int*, kTiers> built{&yes,
                                               KLFAST_IF_AVX2(&yes),
                                               KLFAST_IF_AVXVNNI(&yes),
                                               KLFAST_IF_AVX512VNNI(&yes),
                                               KLFAST_IF_AVX512BF16(&yes),
                                               KLFAST_IF_AMX(&yes)};
    for (std::size_t t = 1; t < kTiers; ++t)
        if (built[t] == nullptr && reasons[t].empty())
            reasons[t] = "the compiler that built klfast could not build it.";
    return reasons;
}

}  // namespace

const std::string& why_not(Tier tier) {
    static const std::array<std::string, kTiers> reasons = all_reasons();
    return reasons[static_cast<int>(tier)];
}

std::map<std::string, std::set<std::string>>& Announce::announced() {
    static std::map<std::string, std::set<std::string>> ops;  // in a function: made before its first user
    return ops;
}

std::map<std::string, std::function<Tier(Tier)>>& Announce::best() {
    static std::map<std::string, std::function<Tier(Tier)>> ops;
    return ops;
}

}  // namespace klfast
