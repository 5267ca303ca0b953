// Vectors of tier scalar: one element, in plain C++.
#pragma once

#include "simd/floats_scalar.h"
#include "simd/ints_scalar.h"
