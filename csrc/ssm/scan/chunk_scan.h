// Mamba-2's scan (SSD) over Vec, in chunks of kChunk steps; lanes are the dimensions of a head.
//
// With a_t = exp(dt_t A), P_t = a_1 ... a_t and L_ts = a_{s+1} ... a_t (s <= t, else 0) within a chunk, S [N, P] the
// state before it, X [Q, P] its inputs:
//   G = C B^T                                  shared by the heads of a group, computed once beforehand
//   Y = (G o L o dt) X + (P_t C) S + D X
//   S <- P_Q S + (L_Qs dt_s B)^T X
// Multiply-adds per step and head: Q P / 2 + 2 N P, where the plain recurrence needs 3 N P and keeps S in no register.
// L and P are products of the a_t, as in the recurrence itself: no differences of cumulative sums, no further exp.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "gemm/small.h"
#include "ssm/scan/scan.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

constexpr int kChunk = 64;  // a multiple of every vector width

inline std::int64_t steps_from(std::int64_t t0, std::int64_t length) { return smaller(length - t0, kChunk); }

// G [chunk, chunk] for each (batch, chunk, group), rows and columns beyond the sequence's end zero.
inline void chunk_products(const ChunkScanArgs& s, std::int64_t n_chunks, float* products) {
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes);
    prepare_for(s.batch * n_chunks * s.groups, 1, s.n_threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scratch(kChunk * (pitch + n_states));
        float* const c = scratch.data;        // [chunk, pitch]
        float* const b = c + kChunk * pitch;  // [states, chunk]
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t batch = item / (n_chunks * s.groups), t0 = item / s.groups % n_chunks * kChunk,
                               g = item % s.groups;
            const std::int64_t n_t = steps_from(t0, s.length);
            load_tile(c, pitch, s.c, batch * s.c.stride[0] + t0 * s.c.stride[1] + g * s.c.stride[2], s.c.stride[3],
                      s.c.stride[1], n_states, n_t);
            load_tile(b, kChunk, s.b, batch * s.b.stride[0] + t0 * s.b.stride[1] + g * s.b.stride[2], s.b.stride[1],
                      s.b.stride[3], n_t, n_states);
            float* const out = products + item * kChunk * kChunk;
            for (int i = 0; i < kChunk * kChunk; ++i) out[i] = 0.0f;
            gemm(n_t, round_up(n_t, kLanes), n_states, 1.0f, c, pitch, 1, b, kChunk, out, kChunk);
        }
    });
}

struct ChunkScratch {
    float *x, *y;                    // [chunk, dim pitch]
    float *b, *c;                    // [chunk, state pitch]
    float* state;                    // [states, dim pitch]
    float* mixed;                    // [chunk, chunk]: G o L o dt
    float *dt, *decay, *ladder, *d;  // [chunk] thrice, [dim pitch]
};

// dt, decays and tiles of x, B and C for one chunk of one head.
inline void load_chunk(const ChunkScanArgs& s, const ChunkScratch& w, std::int64_t batch, std::int64_t head,
                       std::int64_t t0, std::int64_t n_t) {
    const std::int64_t g = head / (s.heads / s.groups);
    load_tile(w.dt, kChunk, s.dt, batch * s.dt.stride[0] + t0 * s.dt.stride[1] + head * s.dt.stride[2], s.dt.stride[1],
              0, n_t, 1);
    const Vec bias = set(s.dt_bias ? load_one(s.dt_bias.data, head * s.dt_bias.stride[0], s.dt_bias.dtype) : 0.0f);
    const Vec rate = set(load_one(s.a.data, head * s.a.stride[0], s.a.dtype));
    for (std::int64_t i = 0; i < round_up(n_t, kLanes); i += kLanes) {
        Vec step = load(w.dt + i) + bias;
        if (s.softplus) step = softplus(step);
        step = min(max(step, set(s.dt_min)), set(s.dt_max));
        store(w.dt + i, step);
        store(w.decay + i, exp(step * rate));
    }
    load_tile(w.x, round_up(s.dim, kLanes), s.x, batch * s.x.stride[0] + t0 * s.x.stride[1] + head * s.x.stride[2],
              s.x.stride[3], s.x.stride[1], s.dim, n_t);
    load_tile(w.b, round_up(s.states, kLanes), s.b, batch * s.b.stride[0] + t0 * s.b.stride[1] + g * s.b.stride[2],
              s.b.stride[3], s.b.stride[1], s.states, n_t);
    load_tile(w.c, round_up(s.states, kLanes), s.c, batch * s.c.stride[0] + t0 * s.c.stride[1] + g * s.c.stride[2],
              s.c.stride[3], s.c.stride[1], s.states, n_t);
}

// Y = D X, zeros without D (an absent D meets no infinity of X).
inline void begin_outputs(const ChunkScanArgs& s, const ChunkScratch& w, std::int64_t n_t) {
    const std::int64_t wide = round_up(s.dim, kLanes);
    for (std::int64_t t = 0; t < n_t; ++t)
        for (std::int64_t i = 0; i < wide; i += kLanes)
            store(w.y + t * wide + i, s.d ? load(w.d + i) * load(w.x + t * wide + i) : set(0.0f));
}

// Y and S as the products say; `product` is G. Without a state before it S is zero, and meets no infinity of C.
inline void advance_chunk(const ChunkScanArgs& s, const ChunkScratch& w, std::int64_t n_t, const float* product,
                          bool has_state) {
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes), wide = round_up(s.dim, kLanes);
    for (int i = 0; i < kChunk; ++i) w.ladder[i] = 0.0f;
    float since_start = 1.0f;
    for (std::int64_t t = 0; t < n_t; ++t) {
        const Vec a = set(w.decay[t]);
        for (std::int64_t i = 0; i < t; i += kLanes) store(w.ladder + i, load(w.ladder + i) * a);
        w.ladder[t] = 1.0f;
        for (int i = 0; i < kChunk; i += kLanes)
            store(w.mixed + t * kChunk + i, load(product + t * kChunk + i) * load(w.ladder + i) * load(w.dt + i));
        since_start *= w.decay[t];
        for (std::int64_t i = 0; i < pitch; i += kLanes)
            store(w.c + t * pitch + i, load(w.c + t * pitch + i) * set(since_start));
    }
    gemm<true>(n_t, wide, n_t, 1.0f, w.mixed, kChunk, 1, w.x, wide, w.y, wide);
    if (has_state) gemm(n_t, wide, n_states, 1.0f, w.c, pitch, 1, w.state, wide, w.y, wide);
    for (std::int64_t t = 0; t < n_t; ++t)
        for (std::int64_t i = 0; i < pitch; i += kLanes)
            store(w.b + t * pitch + i, load(w.b + t * pitch + i) * set(w.ladder[t] * w.dt[t]));
    gemm(n_states, wide, n_t, since_start, w.b, 1, pitch, w.x, wide, w.state, wide);
}

// The same by the recurrence itself, step by step.
inline void recur_chunk(const ChunkScanArgs& s, const ChunkScratch& w, std::int64_t n_t) {
    const std::int64_t n_states = s.states, pitch = round_up(s.states, kLanes), wide = round_up(s.dim, kLanes);
    for (std::int64_t t = 0; t < n_t; ++t)
        for (std::int64_t i = 0; i < wide; i += kLanes) {
            const Vec decay = set(w.decay[t]), input = set(w.dt[t]) * load(w.x + t * wide + i);
            Vec y = load(w.y + t * wide + i);
            for (std::int64_t n = 0; n < n_states; ++n) {
                const Vec state = fma(decay, load(w.state + n * wide + i), input * set(w.b[t * pitch + n]));
                store(w.state + n * wide + i, state);
                y = fma(state, set(w.c[t * pitch + n]), y);
            }
            store(w.y + t * wide + i, y);
        }
}

// Whether n values, whole vectors of them, are finite.
inline bool all_finite(const float* values, std::int64_t n) {
    Vec zero = set(0.0f);
    for (std::int64_t i = 0; i < n; i += kLanes) zero = fma(load(values + i), set(0.0f), zero);
    return sum(zero) == 0.0f;
}

// Computes all chunks of one head by products or, if `plainly`, by the recurrence. Returns whether the results are
// finite before the gate.
inline bool scan_head(const ChunkScanArgs& s, const ChunkScratch& w, std::int64_t batch, std::int64_t head,
                      const float* products, bool plainly) {
    const std::int64_t n_states = s.states, wide = round_up(s.dim, kLanes), n_chunks = (s.length + kChunk - 1) / kChunk,
                       g = head / (s.heads / s.groups);
    const auto carried = [&](const View& v) { return batch * v.stride[0] + head * v.stride[1]; };
    for (int i = 0; i < kChunk; ++i) w.dt[i] = 0.0f;
    if (s.d) load_tile(w.d, wide, s.d, head * s.d.stride[0], s.d.stride[1], 0, s.dim, 1);
    if (s.initial)
        load_tile(w.state, wide, s.initial, carried(s.initial), s.initial.stride[2], s.initial.stride[3], s.dim,
                  n_states);
    else
        for (std::int64_t i = 0; i < n_states * wide; i += kLanes) store(w.state + i, set(0.0f));
    bool finite = true;
    for (std::int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const std::int64_t t0 = chunk * kChunk, n_t = steps_from(t0, s.length);
        load_chunk(s, w, batch, head, t0, n_t);
        begin_outputs(s, w, n_t);
        if (plainly)
            recur_chunk(s, w, n_t);
        else
            advance_chunk(s, w, n_t, products + ((batch * n_chunks + chunk) * s.groups + g) * kChunk * kChunk,
                          chunk > 0 || s.initial);
        finite = finite && all_finite(w.y, n_t * wide);
        if (s.z) {
            load_tile(w.x, wide, s.z, batch * s.z.stride[0] + t0 * s.z.stride[1] + head * s.z.stride[2], s.z.stride[3],
                      s.z.stride[1], s.dim, n_t);
            for (std::int64_t i = 0; i < n_t * wide; i += kLanes) store(w.y + i, load(w.y + i) * silu(load(w.x + i)));
        }
        store_tile(w.y, wide, s.out, batch * s.out.stride[0] + t0 * s.out.stride[1] + head * s.out.stride[2],
                   s.out.stride[3], s.out.stride[1], s.dim, n_t);
    }
    finite = finite && (!s.final || all_finite(w.state, n_states * wide));
    if (s.final && (finite || plainly))  // else the head begins again from `initial`, which may lie there
        store_tile(w.state, wide, s.final, carried(s.final), s.final.stride[2], s.final.stride[3], s.dim, n_states);
    return finite;
}

inline void run(const ChunkScanArgs& s) {
    const std::int64_t pitch = round_up(s.states, kLanes), wide = round_up(s.dim, kLanes),
                       n_chunks = (s.length + kChunk - 1) / kChunk;
    const Buffer<float> products(s.batch * n_chunks * s.groups * kChunk * kChunk);
    chunk_products(s, n_chunks, products.data);
    parallel_for(s.batch * s.heads, 1, s.n_threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scratch(2 * kChunk * (wide + pitch) + s.states * wide + kChunk * kChunk + 3 * kChunk +
                                    wide);
        ChunkScratch w;
        w.x = scratch.data, w.y = w.x + kChunk * wide, w.b = w.y + kChunk * wide, w.c = w.b + kChunk * pitch;
        w.state = w.c + kChunk * pitch, w.mixed = w.state + s.states * wide;
        w.dt = w.mixed + kChunk * kChunk, w.decay = w.dt + kChunk, w.ladder = w.decay + kChunk, w.d = w.ladder + kChunk;
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t batch = item / s.heads, head = item % s.heads;
            // Products add up what the recurrence adds up in another order: of infinities they may make a NaN.
            if (!scan_head(s, w, batch, head, products.data, false)) scan_head(s, w, batch, head, nullptr, true);
        }
    });
}

}  // namespace
}  // namespace klfast
