// Vectors of the tiers from avx512vnni on: AVX-512 F, BW, DQ, VL and VNNI.
#pragma once

#include "simd/floats_avx512.h"
#include "simd/ints_avx512.h"
