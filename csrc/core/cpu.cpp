// CPUID leaves and XCR0 bits: Intel SDM volume 1, chapter 13, and volume 2A, CPUID; AMX permission:
// Linux Documentation/arch/x86/xstate.rst.
#include "core/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace klfast::cpu {

#if defined(__x86_64__)
namespace {

bool has(unsigned leaf, unsigned subleaf, Word word, int bit) {
    unsigned words[4] = {};
    __get_cpuid_count(leaf, subleaf, &words[0], &words[1], &words[2], &words[3]);
    return (words[static_cast<int>(word)] >> bit) & 1u;
}

unsigned long long saved_registers() {
    constexpr int kOsxsave = 27;
    if (!has(1, 0, Word::ecx, kOsxsave)) return 0;
    unsigned lo, hi;
    __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
    return (static_cast<unsigned long long>(hi) << 32) | lo;
}

std::string why_no_tiles() {
#if defined(__linux__)
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
    if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) != 0)
        return "the kernel refused this process the permission to use AMX tiles.";
    return {};
#else
    return "AMX needs Linux's permission call, and this is not Linux.";
#endif
}

}  // namespace

std::string why_not(std::initializer_list<Feature> features) {
    bool tiles = false;
    for (const Feature& feature : features)
        if (!has(feature.leaf, feature.subleaf, feature.word, feature.bit))
            return std::string("this CPU has no ") + feature.name + ".";
    for (const Feature& feature : features) {
        const Registers& needed = *feature.registers;
        if ((saved_registers() & needed.xcr0) != needed.xcr0)
            return std::string("the operating system does not save the ") + needed.name + ".";
        tiles = tiles || &needed == &kTiles;
    }
    return tiles ? why_no_tiles() : std::string();
}

#else

std::string why_not(std::initializer_list<Feature> features) {
    return features.size() == 0 ? "" : "this is not an x86-64 machine.";
}

#endif  // __x86_64__

}  // namespace klfast::cpu
