// Causal convolution over Vec: blocks of channels, time in tiles of floats whose first width - 1 rows are the past.
//   out[t] = act(bias + sum_k w[k] seq[t + k])
#pragma once

#include <cstdint>

#include "ssm/conv/causal_conv1d.h"
#include "core/parallel.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

// Shifts the state of one block of channels, value by value: for a state that one tile does not hold.
inline void carry(const ConvArgs& a, std::int64_t b, std::int64_t c0, std::int64_t n) {
    const std::int64_t total = a.initial_length + a.length;  // initial then x
    const std::int64_t slot = a.slots[b];
    for (std::int64_t c = 0; c < n; ++c)
        for (std::int64_t j = 0; j < a.final_length;
             ++j) {  // upwards: where final is initial, reads come before writes
            const std::int64_t i = total - a.final_length + j;
            const std::int64_t channel = c0 + c, from_x = i - a.initial_length;
            float v = 0.0f;
            if (from_x >= 0)
                v = load_one(a.x.data, b * a.x.stride[0] + channel * a.x.stride[1] + from_x * a.x.stride[2], a.x.dtype);
            else if (i >= 0 && a.initial)
                v = load_one(a.initial.data,
                             slot * a.initial.stride[0] + channel * a.initial.stride[1] + i * a.initial.stride[2],
                             a.initial.dtype);
            store(a.final.data, slot * a.final.stride[0] + channel * a.final.stride[1] + j * a.final.stride[2],
                  a.final.dtype, 1, set(v));
        }
}

// One block of channels of a ring as rows of floats; t counts from the first step of x.
struct Ring {
    const View& values;
    std::int64_t base, first, length, channels;

    Ring(const ConvArgs& a, std::int64_t b, std::int64_t c0, std::int64_t n)
        : values(a.initial),
          base(a.slots[b] * values.stride[0] + c0 * values.stride[1]),
          first(a.steps_seen[b] % a.initial_length),
          length(a.initial_length),
          channels(n) {}

    std::int64_t at(std::int64_t t) const { return base + (first + length + t) % length * values.stride[2]; }
    void load_row(float* row, std::int64_t pitch, std::int64_t t) const {
        load_tile(row, pitch, values, at(t), values.stride[1], 0, channels, 1);
    }
    void store_row(const float* row, std::int64_t pitch, std::int64_t t) const {
        store_tile(row, pitch, values, at(t), values.stride[1], 0, channels, 1);
    }
};

// Rows t of the tile become act(bias + sum_k w[k] tile[t + k]), t < n_t; row t is read last when it is written.
// K is the width, or 0 for one that is known at run time only.
template <int K>
void convolve(float* tile, std::int64_t pitch, const float* weight, const float* bias, std::int64_t width,
              std::int64_t n_t, bool silu_after) {
    for (std::int64_t c = 0; c < pitch; c += kLanes) {
        const Vec b = load(bias + c);
        Vec w[K + 1], x[K + 1];  // K known: the last K rows stay in registers
        for (int k = 0; k < K; ++k) w[k] = load(weight + k * pitch + c);
        for (int k = 0; k + 1 < K; ++k) x[k + 1] = load(tile + k * pitch + c);
        for (std::int64_t t = 0; t < n_t; ++t) {
            Vec y = b;
            if constexpr (K > 0) {
                for (int k = 0; k + 1 < K; ++k) x[k] = x[k + 1];
                x[K - 1] = load(tile + (t + K - 1) * pitch + c);
                for (int k = 0; k < K; ++k) y = fma(w[k], x[k], y);
            } else {
                for (std::int64_t k = 0; k < width; ++k)
                    y = fma(load(weight + k * pitch + c), load(tile + (t + k) * pitch + c), y);
            }
            store(tile + t * pitch + c, silu_after ? silu(y) : y);
        }
    }
}

// Writes zeros to the outputs of a block of channels; `tile` is scratch.
inline void clear(const ConvArgs& a, float* tile, std::int64_t b, std::int64_t c0, std::int64_t n) {
    for (std::int64_t c = 0; c < round_up(n, kLanes); c += kLanes) store(tile + c, set(0.0f));
    store_tile(tile, 0, a.out, b * a.out.stride[0] + c0 * a.out.stride[1], a.out.stride[1], a.out.stride[2], n,
               a.length);
}

inline void run(const ConvArgs& a) {
    constexpr int kChannels = 256, kTime = 16;
    const std::int64_t past = a.width - 1;
    std::int64_t size = kChannels;  // smaller where there would be too few blocks for the threads
    const int threads = worthwhile_threads(a.n_threads, 1.0 * a.batch * a.channels * a.length * (a.width + 25));
    while (size > kLanes && a.batch * ((a.channels + size - 1) / size) < 4 * threads) size /= 2;
    const std::int64_t blocks = (a.channels + size - 1) / size;
    parallel_for(a.batch * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scratch((kTime + 2 * past + a.width + 1) * kChannels);
        float* const tile = scratch.data;                       // [past + kTime, pitch]
        float* const kept = tile + (kTime + past) * kChannels;  // [past, pitch]
        float* const weight = kept + past * kChannels;          // [width, pitch]
        float* const bias = weight + a.width * kChannels;       // [pitch]
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t b = item / blocks, c0 = item % blocks * size;
            const std::int64_t n = smaller(a.channels - c0, size), pitch = round_up(n, kLanes), slot = a.slots[b];
            if (a.slots.skips(b)) {
                clear(a, tile, b, c0, n);
                continue;
            }
            load_tile(weight, pitch, a.weight, c0 * a.weight.stride[0], a.weight.stride[0], a.weight.stride[1], n,
                      a.width);
            if (a.bias)
                load_tile(bias, pitch, a.bias, c0 * a.bias.stride[0], a.bias.stride[0], 0, n, 1);
            else
                for (std::int64_t c = 0; c < pitch; ++c) bias[c] = 0.0f;
            if (a.steps_seen) {
                for (std::int64_t i = 0; i < past; ++i) Ring(a, b, c0, n).load_row(tile + i * pitch, pitch, i - past);
            } else if (a.initial) {
                const std::int64_t base = slot * a.initial.stride[0] + c0 * a.initial.stride[1] +
                                          (a.initial_length - past) * a.initial.stride[2];
                load_tile(tile, pitch, a.initial, base, a.initial.stride[1], a.initial.stride[2], n, past);
            } else {
                for (std::int64_t i = 0; i < past * pitch; ++i) tile[i] = 0.0f;
            }
            const bool in_tile = a.length > 0 && a.length <= kTime && a.final_length <= past + a.length;
            if (a.final && !a.steps_seen && !in_tile) carry(a, b, c0, n);
            for (std::int64_t t0 = 0; t0 < a.length; t0 += kTime) {
                const std::int64_t n_t = smaller(a.length - t0, kTime);
                const auto from = [&](std::int64_t t) {
                    return b * a.x.stride[0] + c0 * a.x.stride[1] + t * a.x.stride[2];
                };
                load_tile(tile + past * pitch, pitch, a.x, from(t0), a.x.stride[1], a.x.stride[2], n, n_t);
                if (t0 + 2 * kTime <= a.length) prefetch(a.x, from(t0 + kTime), a.x.stride[1], a.x.stride[2], n, kTime);
                if (a.steps_seen) {  // steps that the ring still holds in the end, before they become the result
                    for (std::int64_t t = larger(t0, a.length - a.final_length); t < t0 + n_t; ++t)
                        Ring(a, b, c0, n).store_row(tile + (past + t - t0) * pitch, pitch, t);
                } else if (a.final && in_tile) {  // its last rows, likewise
                    const std::int64_t base = slot * a.final.stride[0] + c0 * a.final.stride[1];
                    store_tile(tile + (past + a.length - a.final_length) * pitch, pitch, a.final, base,
                               a.final.stride[1], a.final.stride[2], n, a.final_length);
                }
                for (std::int64_t i = 0; i < past * pitch; ++i) kept[i] = tile[n_t * pitch + i];
                const auto kernel = a.width == 4   ? convolve<4>
                                    : a.width == 3 ? convolve<3>
                                    : a.width == 2 ? convolve<2>
                                                   : convolve<0>;
                kernel(tile, pitch, weight, bias, a.width, n_t, a.silu);
                store_tile(tile, pitch, a.out, b * a.out.stride[0] + c0 * a.out.stride[1] + t0 * a.out.stride[2],
                           a.out.stride[1], a.out.stride[2], n, n_t);
                for (std::int64_t i = 0; i < past * pitch; ++i) tile[i] = kept[i];
            }
        }
    });
}

}  // namespace
}  // namespace klfast
