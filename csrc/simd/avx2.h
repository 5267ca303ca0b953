// Vectors of tier avx2: AVX2, FMA, F16C; integer dot products by vpmaddubsw and vpmaddwd.
#pragma once

#include "simd/floats_avx2.h"
#include "simd/dot_avx2.h"
