// One step of the recurrences over Vec: states lie side by side in memory, so lanes are states; what has one value a
// channel (dt, x, D, z) is prepared for a vector of channels at a time.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "ssm/scan/scan.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

inline void run(const StateUpdateArgs& s) {
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes);
    const std::int64_t blocks = (s.dim + kLanes - 1) / kLanes, per_group = s.heads / s.groups;
    const bool shared_rate = n_states > 0 && s.a.stride[2] == 0;  // Mamba-2 passes one A a head, expanded
    const auto whole_rows = [&](const View& v, int dim) {
        return v.dtype == DType::f32 && v.stride[dim] == 1 && pitch == n_states;
    };
    const bool state_in_place = whole_rows(s.state, 3),
               a_in_place = whole_rows(s.a, 2);  // usual: no way through scratch
    const auto negative_rate = [&](Vec a) { return s.a_is_log ? set(0.0f) - exp(a) : a; };
    const int threads =
        worthwhile_threads(s.n_threads, (s.a_is_log ? 27.0 : 15.0) * s.batch * s.heads * s.dim * s.states);
    parallel_for(s.batch * s.heads * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scratch(4 * pitch);
        float* const a_copy = scratch.data;  // [pitch] each
        float* const h_copy = a_copy + pitch;
        float* const b = h_copy + pitch;
        float* const c = b + pitch;
        alignas(64) float dt[kLanes], x[kLanes], y[kLanes], rate[kLanes], d[kLanes], lane[kLanes];
        for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<float>(i);
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t batch = item / (s.heads * blocks), head = item / blocks % s.heads,
                               c0 = item % blocks * kLanes;
            const int n = lanes(s.dim - c0);
            const auto store_outputs = [&] {
                store_tile(y, kLanes, s.out, batch * s.out.stride[0] + head * s.out.stride[1] + c0 * s.out.stride[2],
                           s.out.stride[2], 0, n, 1);
            };
            if (s.slots.skips(batch)) {
                store(y, set(0.0f));
                store_outputs();
                continue;
            }
            const std::int64_t state_base = s.slots[batch] * s.state.stride[0] + head * s.state.stride[1];
            // head_dim: which of v's dimensions is the head
            const auto channels = [&](float* to, const View& v, int head_dim) {
                const std::int64_t base =
                    head_dim * batch * v.stride[0] + head * v.stride[head_dim] + c0 * v.stride[head_dim + 1];
                load_tile(to, kLanes, v, base, v.stride[head_dim + 1], 0, n, 1);
            };
            const auto states = [&](float* to, const View& v, std::int64_t base, int dim) {
                load_tile(to, pitch, v, base, v.stride[dim], 0, n_states, 1);
            };
            channels(dt, s.dt, 1);
            channels(x, s.x, 1);
            Vec step = load(dt);
            if (s.dt_bias) channels(y, s.dt_bias, 0), step = step + load(y);
            if (s.softplus) step = softplus(step);
            store(dt, step);
            if (shared_rate) channels(rate, s.a, 0), store(rate, exp(step * negative_rate(load(rate))));
            store(d, set(0.0f));
            if (s.d) channels(d, s.d, 0);
            const std::int64_t g = head / per_group;
            states(b, s.b, batch * s.b.stride[0] + g * s.b.stride[1], 2);
            states(c, s.c, batch * s.c.stride[0] + g * s.c.stride[1], 2);
            for (int i = 0; i < n; ++i) {
                const std::int64_t base = state_base + (c0 + i) * s.state.stride[2];
                const std::int64_t a_base = head * s.a.stride[0] + (c0 + i) * s.a.stride[1];
                if (!state_in_place) states(h_copy, s.state, base, 3);
                if (!shared_rate && !a_in_place) states(a_copy, s.a, a_base, 2);
                float* const h = state_in_place ? static_cast<float*>(s.state.data) + base : h_copy;
                const float* const a = a_in_place ? static_cast<const float*>(s.a.data) + a_base : a_copy;
                const Vec input = set(dt[i] * x[i]), tau = set(dt[i]);
                Vec decay = set(rate[i]), dot = set(0.0f);
                const auto step_of = [&](std::int64_t k) {
                    if (!shared_rate) decay = exp(tau * negative_rate(load(a + k)));
                    return fma(decay, load(h + k), input * load(b + k));
                };
                std::int64_t k = 0;
                for (; k + kLanes <= n_states; k += kLanes) {
                    const Vec next = step_of(k);
                    dot = fma(next, load(c + k), dot);
                    store(h + k, next);
                }
                if (k < n_states) {  // lanes behind the last state are zeros, whatever an infinite input makes of them
                    const Vec next =
                        select_less(load(lane), set(static_cast<float>(n_states - k)), step_of(k), set(0.0f));
                    dot = fma(next, load(c + k), dot);
                    store(h + k, next);
                }
                if (!state_in_place) store_tile(h, pitch, s.state, base, s.state.stride[3], 0, n_states, 1);
                y[i] = sum(dot) + (s.d ? d[i] * x[i] : 0.0f);
            }
            for (int i = n; i < kLanes; ++i) y[i] = 0.0f;
            if (s.z) channels(x, s.z, 1), store(y, load(y) * silu(load(x)));
            store_outputs();
        }
    });
}

}  // namespace
}  // namespace klfast
