// Vectors of tier avxvnni: those of tier avx2, with integer dot products by vpdpbusd.
#pragma once

#include "simd/floats_avx2.h"
#include "simd/dot_avxvnni.h"
