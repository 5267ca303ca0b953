// One float under the interface of simd/floats_avx2.h and simd/floats_avx512.h, with the C library's functions: what
// the wider vectors are checked against. Everything is local to the including translation unit, for its flags are its
// own.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

namespace klfast {
namespace {

struct Vec {
    static constexpr int width = 1;
    float v;
};

constexpr int kLanes = Vec::width;

inline Vec set(float a) { return {a}; }
inline Vec load(const float* p) { return {*p}; }
inline void store(float* p, Vec a) { *p = a.v; }
// `n` elements (here always 1) of type t from index i on, the other lanes zero.
inline Vec load(const void* p, std::int64_t i, DType t, int) { return {load_float(p, i, t)}; }
inline void store(void* p, std::int64_t i, DType t, int, Vec a) { store_float(p, i, t, a.v); }
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec min(Vec a, Vec b) { return {b.v < a.v ? b.v : a.v}; }  // a NaN in a passes, as in max
inline Vec max(Vec a, Vec b) { return {b.v > a.v ? b.v : a.v}; }
inline Vec negative_abs(Vec a) { return {-std::fabs(a.v)}; }
inline Vec copysign(Vec size, Vec sign) { return {std::copysign(size.v, sign.v)}; }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes : no; }
inline Vec quotient(Vec a, Vec b) { return a / b; }
inline Vec wide_quotient(Vec a, Vec b) { return a / b; }
inline float sum(Vec a) { return a.v; }

inline Vec exp(Vec x) { return {std::exp(x.v)}; }
inline Vec expm1(Vec x) { return {std::expm1(x.v)}; }
inline Vec exp2(Vec x) { return {std::exp2(x.v)}; }
inline Vec softplus(Vec x) { return {std::fmax(x.v, 0.0f) + std::log1p(std::exp(-std::fabs(x.v)))}; }
inline Vec silu(Vec x) { return {x.v / (1.0f + std::exp(-x.v))}; }
inline Vec sigmoid(Vec x) { return {1.0f / (1.0f + std::exp(-x.v))}; }

}  // namespace
}  // namespace klfast
