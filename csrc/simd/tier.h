// The vector types of the tier that is being compiled: includes simd/<tier>.h, where KLFAST_TIER says which.
#pragma once

#define KLFAST_QUOTED(text) #text
#define KLFAST_HEADER(path) KLFAST_QUOTED(path)
// clang-format off
#include KLFAST_HEADER(simd/KLFAST_TIER.h)
// clang-format on
