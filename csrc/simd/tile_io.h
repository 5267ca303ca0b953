// Rectangles of a strided tensor as rows of floats: tile[t * pitch + c], c padded with zeros to whole vectors.
// Included after simd/tier.h; local to the including translation unit.
#pragma once

#include <cstdint>

#include "core/buffer.h"
#include "core/integers.h"
#include "core/tensor_view.h"

namespace klfast {
namespace {

// Lanes of a vector that `left` elements fill.
inline int lanes(std::int64_t left) { return static_cast<int>(smaller(left, kLanes)); }

inline float load_one(const void* p, std::int64_t i, DType t) {
    float lanes[kLanes];
    store(lanes, load(p, i, t, 1));
    return lanes[0];
}

// Elements base + c stride_c + t stride_t of `from`, c < n_c, t < n_t. Memory is read along whichever stride is 1.
inline void load_tile(float* tile, std::int64_t pitch, const View& from, std::int64_t base, std::int64_t stride_c,
                      std::int64_t stride_t, std::int64_t n_c, std::int64_t n_t) {
    const std::int64_t padded = round_up(n_c, kLanes);
    if (stride_c == 1) {
        for (std::int64_t t = 0; t < n_t; ++t)
            for (std::int64_t c = 0; c < padded; c += kLanes)
                store(tile + t * pitch + c, load(from.data, base + t * stride_t + c, from.dtype, lanes(n_c - c)));
        return;
    }
    if (stride_t == 1) {
        for (std::int64_t t = 0; t < n_t; t += kLanes)
            for (std::int64_t c = 0; c < padded; c += kLanes) {
                Ints rows[kLanes];
                const int n = lanes(n_t - t);
                for (int i = 0; i < kLanes; ++i)
                    rows[i] = c + i < n_c ? bits_of(load(from.data, base + (c + i) * stride_c + t, from.dtype, n))
                                          : set_int(0);
                transpose(rows);
                for (int i = 0; i < n; ++i) store(tile + (t + i) * pitch + c, float_bits(rows[i]));
            }
        return;
    }
    for (std::int64_t t = 0; t < n_t; ++t) {
        for (std::int64_t c = 0; c < n_c; ++c)
            tile[t * pitch + c] = load_one(from.data, base + c * stride_c + t * stride_t, from.dtype);
        for (std::int64_t c = n_c; c < padded; ++c) tile[t * pitch + c] = 0.0f;
    }
}

// The inverse: writes n_c x n_t elements.
inline void store_tile(const float* tile, std::int64_t pitch, const View& to, std::int64_t base, std::int64_t stride_c,
                       std::int64_t stride_t, std::int64_t n_c, std::int64_t n_t) {
    if (stride_c == 1) {
        for (std::int64_t t = 0; t < n_t; ++t)
            for (std::int64_t c = 0; c < n_c; c += kLanes)
                store(to.data, base + t * stride_t + c, to.dtype, lanes(n_c - c), load(tile + t * pitch + c));
        return;
    }
    if (stride_t == 1) {
        for (std::int64_t t = 0; t < n_t; t += kLanes)
            for (std::int64_t c = 0; c < n_c; c += kLanes) {
                Ints rows[kLanes];
                const int n = lanes(n_t - t);
                for (int i = 0; i < kLanes; ++i)
                    rows[i] = i < n ? bits_of(load(tile + (t + i) * pitch + c)) : set_int(0);
                transpose(rows);
                for (int i = 0; i < kLanes && c + i < n_c; ++i)
                    store(to.data, base + (c + i) * stride_c + t, to.dtype, n, float_bits(rows[i]));
            }
        return;
    }
    for (std::int64_t t = 0; t < n_t; ++t)
        for (std::int64_t c = 0; c < n_c; ++c)
            store(to.data, base + c * stride_c + t * stride_t, to.dtype, 1, set(tile[t * pitch + c]));
}

// Asks for a part of the tile that load_tile would read, where that lies in runs along c or t.
inline void prefetch(const View& from, std::int64_t base, std::int64_t stride_c, std::int64_t stride_t,
                     std::int64_t n_c, std::int64_t n_t, std::int64_t part = 0, std::int64_t parts = 1) {
    if (stride_c != 1 && stride_t != 1) return;
    const std::int64_t size = size_of(from.dtype), runs = stride_c == 1 ? n_t : n_c,
                       run = (stride_c == 1 ? n_c : n_t) * size;
    const std::int64_t stride = (stride_c == 1 ? stride_t : stride_c) * size;
    const char* const data = static_cast<const char*>(from.data) + base * size;
    for (std::int64_t r = runs * part / parts; r < runs * (part + 1) / parts; ++r)
        for (std::int64_t i = 0; i < run; i += 64) __builtin_prefetch(data + r * stride + i);
}

}  // namespace
}  // namespace klfast
