// Plain C++: one float at a time.
#include <cmath>

#include "divergence/divergence.h"

#define KLFAST_TIER scalar

namespace klfast::scalar {
namespace {

using F = float;
constexpr int kWidth = 1;

inline F load(const float* p) { return *p; }
inline F load_n(const float* p, int n, float fill) { return n > 0 ? *p : fill; }
inline void store(float* p, F v) { *p = v; }
inline F splat(float s) { return s; }
inline F lanes(int n) { return n > 0 ? 1.0f : 0.0f; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F v) { return std::fabs(v); }
inline F copysign(F size, F sign) { return std::copysign(size, sign); }
inline F round(F v) { return (v + 0x1.8p23f) - 0x1.8p23f; }
inline F scale(F v, F n) { return v * std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23); }
inline F less(F u, F v, F yes, F no) { return u < v ? yes : no; }

}  // namespace
}  // namespace klfast::scalar

#include "divergence/sums.h"

namespace klfast::scalar {
namespace {
void widen(const void* from, DType dtype, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] = load_float(from, i, dtype);
}
}  // namespace
const divergence::Kernels kDivergence{scan, sums, moments, widen};
}  // namespace klfast::scalar
