// Features of the CPU that core/tiers.def names, and whether this machine has them.
#pragma once

#include <initializer_list>
#include <string>

namespace klfast::cpu {

// Registers that the operating system must save, as bits of XCR0.
struct Registers {
    unsigned long long xcr0;
    const char* name;
};
inline constexpr Registers kAvx{.xcr0 = 0x6, .name = "AVX registers"};
inline constexpr Registers kAvx512{.xcr0 = 0xe6, .name = "AVX-512 registers"};
inline constexpr Registers kTiles{.xcr0 = 0x60000, .name = "AMX tiles"};

enum class Word { eax, ebx, ecx, edx };

// A bit that CPUID returns in one of four words.
struct Feature {
    const char* name;
    unsigned leaf, subleaf;
    Word word;
    int bit;
    const Registers* registers;
};

// clang-format off
inline constexpr Feature
    fma         {.name = "FMA",          .leaf = 1, .subleaf = 0, .word = Word::ecx, .bit = 12, .registers = &kAvx},
    avx         {.name = "AVX",          .leaf = 1, .subleaf = 0, .word = Word::ecx, .bit = 28, .registers = &kAvx},
    f16c        {.name = "F16C",         .leaf = 1, .subleaf = 0, .word = Word::ecx, .bit = 29, .registers = &kAvx},
    avx2        {.name = "AVX2",         .leaf = 7, .subleaf = 0, .word = Word::ebx, .bit = 5,  .registers = &kAvx},
    bmi2        {.name = "BMI2",         .leaf = 7, .subleaf = 0, .word = Word::ebx, .bit = 8,  .registers = &kAvx},
    avx512f     {.name = "AVX-512F",     .leaf = 7, .subleaf = 0, .word = Word::ebx, .bit = 16, .registers = &kAvx512},
    avx512dq    {.name = "AVX-512DQ",    .leaf = 7, .subleaf = 0, .word = Word::ebx, .bit = 17, .registers = &kAvx512},
    avx512bw    {.name = "AVX-512BW",    .leaf = 7, .subleaf = 0, .word = Word::ebx, .bit = 30, .registers = &kAvx512},
    avx512vl    {.name = "AVX-512VL",    .leaf = 7, .subleaf = 0, .word = Word::ebx, .bit = 31, .registers = &kAvx512},
    avx512_vnni {.name = "AVX-512-VNNI", .leaf = 7, .subleaf = 0, .word = Word::ecx, .bit = 11, .registers = &kAvx512},
    avx512_bf16 {.name = "AVX-512-BF16", .leaf = 7, .subleaf = 1, .word = Word::eax, .bit = 5,  .registers = &kAvx512};

// The twins of two tiers, for tests (setup.py), need what stands in for the instructions.
#ifdef KLFAST_AVXVNNI_TWIN
inline constexpr Feature avx_vnni{.name = "AVX-512-VNNI to stand in for AVX-VNNI", .leaf = 7, .subleaf = 0,
                                  .word = Word::ecx, .bit = 11, .registers = &kAvx512};
#else
inline constexpr Feature avx_vnni{.name = "AVX-VNNI", .leaf = 7, .subleaf = 1, .word = Word::eax, .bit = 4,
                                  .registers = &kAvx};
#endif
#ifdef KLFAST_AMX_TWIN
inline constexpr Feature amx_tile = avx512_bf16, amx_int8 = avx512_bf16, amx_bf16 = avx512_bf16;
#else
inline constexpr Feature
    amx_bf16    {.name = "AMX-BF16",     .leaf = 7, .subleaf = 0, .word = Word::edx, .bit = 22, .registers = &kTiles},
    amx_tile    {.name = "AMX-TILE",     .leaf = 7, .subleaf = 0, .word = Word::edx, .bit = 24, .registers = &kTiles},
    amx_int8    {.name = "AMX-INT8",     .leaf = 7, .subleaf = 0, .word = Word::edx, .bit = 25, .registers = &kTiles};
#endif
// clang-format on

// Why this process cannot use all of the features, one sentence; empty if it can: one is not in CPUID, its registers
// are not saved by the operating system, or the kernel refuses the permission for tiles.
std::string why_not(std::initializer_list<Feature> features);

}  // namespace klfast::cpu
