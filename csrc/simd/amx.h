// Tiles, AMX: eight registers tmm0 .. tmm7 of up to 16 rows of 64 bytes, whose shapes a configuration sets for the
// thread.
//     ldtilecfg, tilerelease     configure; give the registers back
//     tileloadd, tilestored      rows from and to memory, `stride` bytes apart
//     tdpbf16ps  C += A B        A [m, 2 k] bf16, B [k, 2 n]: pairs of k side by side; C [m, n] float32
//     tdpbssd    C += A B        A [m, 4 k] int8, B [k, 4 n]: quads of k side by side; C [m, n] int32
// tdpbf16ps takes subnormal numbers for zeros and rounds to nearest even, whatever the thread's settings.
//
// The instructions are written down here because GCC's intrinsics do not tell the compiler that tileloadd and ldtilecfg
// read memory, and take no template arguments. KLFAST_AMX_TWIN puts a model of the registers in their place (setup.py).
// Everything is local to the including translation unit, for its flags are its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace klfast {
namespace {

constexpr int kTileRegisters = 8, kTileSide = 16, kTileRowBytes = 64;  // a tile's rows, and columns of C

// The operand of ldtilecfg.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64 && offsetof(TileConfig, row_bytes) == 16 && offsetof(TileConfig, rows) == 48);

}  // namespace
}  // namespace klfast

#ifdef KLFAST_AMX_TWIN
#include "simd/amx_model.h"
#else

namespace klfast {
namespace {

inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }

template <int T>
[[gnu::always_inline]] inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}

template <int T>
[[gnu::always_inline]] inline void tile_load(const void* from, std::ptrdiff_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
[[gnu::always_inline]] inline void tile_store(void* to, std::ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}

template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_dot_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace klfast
#endif
