// Selective scan over Vec: one lane a channel, so that all of a step but C . h is elementwise and C . h is a chain of
// FMAs without horizontal sums. Time goes in tiles of floats (dt, dt u, z, y) of many channels, so that memory is read
// in long runs; the states are taken kStates at a time through a vector of a tile's channels, with h and A in
// registers.
//
// Operations per channel, step and state: 1 multiply (dt A log2 e), exp2 (5 FMAs, round, subtract, scale), 1 multiply
// (dt u B), 2 FMAs (h, y).
#pragma once

#include <cstdint>

#include "core/numbers.h"
#include "core/parallel.h"
#include "ssm/scan/scan.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

constexpr int kTime = 16, kBlockChannels = 256;  // of a tile
constexpr int kPitch = kBlockChannels + kLanes;  // not a power of two: a column of such rows has few places in L1

// B or C of K states: [time, pitch], of all channels, or constant in time: [K, kLanes].
template <int K, bool kConstant>
struct Coefficients {
    const float* of_steps;
    std::int64_t pitch;
    Vec constant[K];

    Coefficients(const float* from, std::int64_t pitch) : of_steps(from), pitch(pitch) {
        if constexpr (kConstant)
            for (int k = 0; k < K; ++k) constant[k] = load(from + k * kLanes);
    }

    Vec at(std::int64_t t, int k) const {
        if constexpr (kConstant)
            return constant[k];
        else
            return set(of_steps[t * pitch + k]);
    }
};

// K states through kLanes channels of a tile. a, h: [K, kLanes]; b, c: Coefficients from the first state on; dt, du, y:
// [time, kPitch].
template <int K, bool kConstantB, bool kConstantC>
void advance(const float* a, float* h, const float* b, const float* c, std::int64_t pitch, const float* dt,
             const float* du, float* y, std::int64_t n_t) {
    const Coefficients<K, kConstantB> in(b, pitch);
    const Coefficients<K, kConstantC> out(c, pitch);
    Vec state[K], rate[K];
    for (int k = 0; k < K; ++k) state[k] = load(h + k * kLanes), rate[k] = load(a + k * kLanes);
    for (std::int64_t t = 0; t < n_t; ++t) {
        const std::int64_t at = t * kPitch;
        const Vec step = load(dt + at), input = load(du + at);
        Vec sum = load(y + at);
        for (int k = 0; k < K; ++k) {
            state[k] = fma(exp2(step * rate[k]), state[k], input * in.at(t, k));
            sum = fma(state[k], out.at(t, k), sum);
        }
        store(y + at, sum);
    }
    for (int k = 0; k < K; ++k) store(h + k * kLanes, state[k]);
}

// A block of neighbouring channels of one group and batch entry, at most kBlockChannels: its rows fill whole cache
// lines, and B and C are read once for all of it.
struct Block {
    std::int64_t batch, group, c0, n;
};

struct ScanScratch {
    float *a, *h, *d, *bias;  // [block / kLanes, states, kLanes] (a times log2 e) twice, [block] twice
    float *b, *c;             // [time, state pitch], or as a if constant
    float *dt, *u, *z, *y;    // [time, kPitch]
};

// All states of kLanes channels from c on through a tile.
template <bool kConstantB, bool kConstantC>
void advance_all(const SelectiveScanArgs& s, const ScanScratch& w, std::int64_t c, const float* dt, const float* du,
                 float* y, std::int64_t n_t) {
    constexpr int kStates = 4;
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes);
    const float* const a = w.a + c * n_states;
    float* const h = w.h + c * n_states;
    const auto b_from = [&](std::int64_t k) { return w.b + (kConstantB ? c * n_states + k * kLanes : k); };
    const auto c_from = [&](std::int64_t k) { return w.c + (kConstantC ? c * n_states + k * kLanes : k); };
    std::int64_t k = 0;
    for (; k + kStates <= n_states; k += kStates)
        advance<kStates, kConstantB, kConstantC>(a + k * kLanes, h + k * kLanes, b_from(k), c_from(k), pitch, dt, du, y,
                                                 n_t);
    for (; k < n_states; ++k)
        advance<1, kConstantB, kConstantC>(a + k * kLanes, h + k * kLanes, b_from(k), c_from(k), pitch, dt, du, y, n_t);
}

// kLanes channels from c on of a tile, n_t steps; leaves y.
inline void scan_vector(const SelectiveScanArgs& s, const ScanScratch& w, std::int64_t c, std::int64_t n_t) {
    float *const dt = w.dt + c, *const u = w.u + c, *const y = w.y + c;
    const Vec bias = load(w.bias + c), d = load(w.d + c);
    for (std::int64_t i = 0; i < n_t * kPitch; i += kPitch) {
        Vec step = load(dt + i) + bias;
        if (s.softplus) step = softplus(step);
        const Vec input = load(u + i);
        store(dt + i, step);
        store(u + i, step * input);
        store(y + i, s.d ? d * input : set(0.0f));  // an absent D meets no infinity of u
    }
    const auto all = s.constant_b ? (s.constant_c ? advance_all<true, true> : advance_all<true, false>)
                                  : (s.constant_c ? advance_all<false, true> : advance_all<false, false>);
    all(s, w, c, dt, u, y, n_t);
    if (s.z)
        for (std::int64_t i = 0; i < n_t * kPitch; i += kPitch) store(y + i, load(y + i) * silu(load(w.z + c + i)));
}

inline void scan_block(const SelectiveScanArgs& s, const ScanScratch& w, const Block& block) {
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes);
    const auto used = [&](std::int64_t c) { return lanes(block.n - c); };
    const auto carried = [&](const View& v, std::int64_t c) {
        return block.batch * v.stride[0] + (block.c0 + c) * v.stride[1];
    };
    for (std::int64_t c = 0; c < block.n; c += kLanes) {
        const auto of_channels = [&](float* to, const View& v) {
            load_tile(to + c * n_states, kLanes, v, (block.c0 + c) * v.stride[0], v.stride[0], v.stride[1], used(c),
                      n_states);
        };
        of_channels(w.a, s.a);
        if (s.constant_b) of_channels(w.b, s.b);
        if (s.constant_c) of_channels(w.c, s.c);
        if (s.initial)
            load_tile(w.h + c * n_states, kLanes, s.initial, carried(s.initial, c), s.initial.stride[1],
                      s.initial.stride[2], used(c), n_states);
        else
            for (std::int64_t i = c * n_states; i < (c + kLanes) * n_states; i += kLanes) store(w.h + i, set(0.0f));
        for (std::int64_t i = c * n_states; i < (c + kLanes) * n_states; i += kLanes)
            store(w.a + i, load(w.a + i) * set(kLog2e));
        store(w.d + c, set(0.0f)), store(w.bias + c, set(0.0f));
    }
    if (s.d) load_tile(w.d, round_up(block.n, kLanes), s.d, block.c0 * s.d.stride[0], s.d.stride[0], 0, block.n, 1);
    if (s.delta_bias)
        load_tile(w.bias, round_up(block.n, kLanes), s.delta_bias, block.c0 * s.delta_bias.stride[0],
                  s.delta_bias.stride[0], 0, block.n, 1);
    for (std::int64_t t0 = 0; t0 < s.length; t0 += kTime) {
        const auto steps = [&](std::int64_t from) { return smaller(s.length - from, kTime); };
        const auto states = [&](float* tile, const View& v) {
            load_tile(tile, pitch, v, block.batch * v.stride[0] + block.group * v.stride[1] + t0 * v.stride[3],
                      v.stride[2], v.stride[3], n_states, steps(t0));
        };
        if (!s.constant_b) states(w.b, s.b);
        if (!s.constant_c) states(w.c, s.c);
        const auto at = [&](const View& v) {
            return block.batch * v.stride[0] + block.c0 * v.stride[1] + t0 * v.stride[2];
        };
        const auto channels = [&](float* tile, const View& v) {
            load_tile(tile, kPitch, v, at(v), v.stride[1], v.stride[2], block.n, steps(t0));
        };
        channels(w.u, s.u), channels(w.dt, s.delta);
        if (s.z) channels(w.z, s.z);
        for (std::int64_t c = 0; c < block.n; c += kLanes) {
            const std::int64_t half = round_up(block.n, 2 * kLanes) / 2;
            for (const View* v : {&s.u, &s.delta, &s.z})  // in the first half of a tile, bit by bit the next one
                if (*v && c < half && t0 + kTime < s.length)
                    prefetch(*v, at(*v) + kTime * v->stride[2], v->stride[1], v->stride[2], block.n, steps(t0 + kTime),
                             c / kLanes, half / kLanes);
            scan_vector(s, w, c, steps(t0));
        }
        store_tile(w.y, kPitch, s.out, at(s.out), s.out.stride[1], s.out.stride[2], block.n, steps(t0));
    }
    for (std::int64_t c = 0; c < block.n; c += kLanes)
        store_tile(w.h + c * n_states, kLanes, s.state, carried(s.state, c), s.state.stride[1], s.state.stride[2],
                   used(c), n_states);
}

inline void run(const SelectiveScanArgs& s) {
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes);
    const std::int64_t group = s.channels / s.groups;
    std::int64_t size = kBlockChannels;  // smaller where there would be too few blocks for the threads
    const int threads = worthwhile_threads(s.n_threads, 15.0 * s.batch * s.channels * s.length * s.states);
    while (size > kLanes && s.batch * s.groups * ((group + size - 1) / size) < 4 * threads) size /= 2;
    const std::int64_t blocks = (group + size - 1) / size;
    parallel_for(s.batch * s.groups * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const auto coefficients = [&](bool constant) { return constant ? n_states * kBlockChannels : kTime * pitch; };
        const Buffer<float> scratch(2 * (n_states + 1) * kBlockChannels + coefficients(s.constant_b) +
                                    coefficients(s.constant_c) + 4 * kTime * kPitch);
        ScanScratch w;
        w.a = scratch.data, w.h = w.a + n_states * kBlockChannels, w.d = w.h + n_states * kBlockChannels,
        w.bias = w.d + kBlockChannels;
        w.b = w.bias + kBlockChannels, w.c = w.b + coefficients(s.constant_b);
        w.dt = w.c + coefficients(s.constant_c), w.u = w.dt + kTime * kPitch, w.z = w.u + kTime * kPitch,
        w.y = w.z + kTime * kPitch;
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t g = item / blocks % s.groups, first = item % blocks * size;
            const Block block{
                .batch = item / (s.groups * blocks),
                .group = g,
                .c0 = g * group + first,
                .n = smaller(group - first, size),
            };
            scan_block(s, w, block);
        }
    });
}

}  // namespace
}  // namespace klfast
