// Selective scan over Vec: one lane a channel, so that all of a step but C . h is elementwise and C . h is a chain of
// FMAs without horizontal sums. Time goes in tiles of floats (dt, dt u, y) that stay in L1, and the states are taken
// kStates at a time through a whole tile with h and A in registers.
//
// Operations per channel, step and state: 1 multiply (dt A log2 e), exp2 (5 FMAs, round, subtract, scale), 1 multiply
// (dt u B), 2 FMAs (h, y).
#pragma once

#include <cstdint>

#include "parallel.h"
#include "scan/scan.h"
#include "vec/tile.h"

namespace klfast {
namespace {

constexpr int kTime = 32;
constexpr float kLog2E = 0x1.715476p+0f;

// K states through a tile. a, h: [K, W], b, c: [time, pitch] from the first state on; dt, du, y: [time, W].
template <int K>
void advance(const float* a, float* h, const float* b, const float* c, int pitch, const float* dt, const float* du, float* y, int n_t) {
    constexpr int W = Vec::width;
    Vec state[K], rate[K];
    for (int k = 0; k < K; ++k) state[k] = load(h + k * W), rate[k] = load(a + k * W);
    for (int t = 0; t < n_t; ++t) {
        const Vec step = load(dt + t * W), input = load(du + t * W);
        Vec sum = load(y + t * W);
        for (int k = 0; k < K; ++k) {
            state[k] = fma(exp2(step * rate[k]), state[k], input * set(b[t * pitch + k]));
            sum = fma(state[k], set(c[t * pitch + k]), sum);
        }
        store(y + t * W, sum);
    }
    for (int k = 0; k < K; ++k) store(h + k * W, state[k]);
}

inline void run(const SelectiveScanArgs& s) {
    constexpr int W = Vec::width, kStates = 4;
    const int n_states = static_cast<int>(s.states), pitch = round_up(s.states);
    const std::int64_t group = s.channels / s.groups, blocks = (group + W - 1) / W;
    parallel_for(s.batch * s.groups * blocks, 1, s.n_threads, [&](std::int64_t begin, std::int64_t end) {
        const Scratch scratch(2 * n_states * W + 2 * kTime * pitch);
        float* const a = scratch.data;           // [states, W], times log2 e
        float* const h = a + n_states * W;       // [states, W]
        float* const b = h + n_states * W;       // [time, pitch]
        float* const c = b + kTime * pitch;      // [time, pitch]
        alignas(64) float dt[kTime * W], u[kTime * W], y[kTime * W], d[W], bias[W];
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t batch = item / (s.groups * blocks), g = item / blocks % s.groups, in_group = item % blocks * W;
            const std::int64_t c0 = g * group + in_group;
            const int n = static_cast<int>(group - in_group < W ? group - in_group : W);
            load_tile(a, W, s.a, c0 * s.a.stride[0], s.a.stride[0], s.a.stride[1], n, n_states);
            for (int i = 0; i < n_states * W; i += W) store(a + i, load(a + i) * set(kLog2E)), store(h + i, set(0.0f));
            store(d, set(0.0f));
            store(bias, set(0.0f));
            if (s.d) load_tile(d, W, s.d, c0 * s.d.stride[0], s.d.stride[0], 0, n, 1);
            if (s.delta_bias) load_tile(bias, W, s.delta_bias, c0 * s.delta_bias.stride[0], s.delta_bias.stride[0], 0, n, 1);
            for (std::int64_t t0 = 0; t0 < s.length; t0 += kTime) {
                const int n_t = static_cast<int>(s.length - t0 < kTime ? s.length - t0 : kTime);
                const auto rows = [&](float* tile, const View& v) {
                    load_tile(tile, W, v, batch * v.stride[0] + c0 * v.stride[1] + t0 * v.stride[2], v.stride[1], v.stride[2], n, n_t);
                };
                rows(u, s.u);
                rows(dt, s.delta);
                load_tile(b, pitch, s.b, batch * s.b.stride[0] + g * s.b.stride[1] + t0 * s.b.stride[3], s.b.stride[2], s.b.stride[3], n_states, n_t);
                load_tile(c, pitch, s.c, batch * s.c.stride[0] + g * s.c.stride[1] + t0 * s.c.stride[3], s.c.stride[2], s.c.stride[3], n_states, n_t);
                for (int i = 0; i < n_t * W; i += W) {
                    Vec step = load(dt + i) + load(bias);
                    if (s.softplus) step = softplus(step);
                    const Vec input = load(u + i);
                    store(dt + i, step);
                    store(u + i, step * input);
                    store(y + i, load(d) * input);
                }
                int k = 0;
                for (; k + kStates <= n_states; k += kStates) advance<kStates>(a + k * W, h + k * W, b + k, c + k, pitch, dt, u, y, n_t);
                for (; k < n_states; ++k) advance<1>(a + k * W, h + k * W, b + k, c + k, pitch, dt, u, y, n_t);
                if (s.z) {
                    rows(u, s.z);
                    for (int i = 0; i < n_t * W; i += W) store(y + i, load(y + i) * silu(load(u + i)));
                }
                store_tile(y, W, s.out, batch * s.out.stride[0] + c0 * s.out.stride[1] + t0 * s.out.stride[2], s.out.stride[1], s.out.stride[2], n, n_t);
            }
            store_tile(h, W, s.state, batch * s.state.stride[0] + c0 * s.state.stride[1], s.state.stride[1], s.state.stride[2], n, n_states);
        }
    });
}

}  // namespace
}  // namespace klfast
