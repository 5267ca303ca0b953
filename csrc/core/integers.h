// Arithmetic of sizes and indices. Local to the including translation unit, for its flags are its own: a function that
// the linker shares between units might be the one compiled for a tier.
#pragma once

#include <cstdint>

namespace klfast {
namespace {

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

inline std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace klfast
