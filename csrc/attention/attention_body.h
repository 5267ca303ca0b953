// Decode attention over Vec, in float32: the query heads that share a key head go over its keys and values together, so
// that each is loaded and widened once. Scores stay in L1 or L2: keys * heads-of-a-group floats.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "parallel.h"
#include "vec/tile.h"

namespace klfast {
namespace {

constexpr int kHeads = 8;  // that go together at most

// One key head's rows, or those of its values: `first` is the index of the first element, `stride` from row to row.
struct Rows {
    const void* data;
    DType dtype;
    std::int64_t first, stride;
    int width;

    Vec operator()(std::int64_t row, int column) const {
        const int left = width - column;
        return load(data, first + row * stride + column, dtype, left < Vec::width ? left : Vec::width);
    }
};

// scores[h * pitch + s] = q_h . k_s, q [H, padded] with zeros behind its width.
template <int H>
void score(const Rows& k, const float* q, int padded, std::int64_t keys, float* scores, std::int64_t pitch) {
    for (std::int64_t s = 0; s < keys; ++s) {
        Vec dot[H];
        for (int h = 0; h < H; ++h) dot[h] = set(0.0f);
        for (int c = 0; c < padded; c += Vec::width) {
            const Vec key = k(s, c);
            for (int h = 0; h < H; ++h) dot[h] = fma(load(q + h * padded + c), key, dot[h]);
        }
        for (int h = 0; h < H; ++h) scores[h * pitch + s] = sum(dot[h]);
    }
}

// Scores of one head become weights, not normalised; returns their sum. What lies between keys and pitch becomes 0.
inline float weigh(float* scores, std::int64_t keys, std::int64_t pitch) {
    float highest = scores[0];
    for (std::int64_t s = 1; s < keys; ++s) highest = scores[s] > highest ? scores[s] : highest;
    for (std::int64_t s = keys; s < pitch; ++s) scores[s] = -__builtin_inff();
    Vec total = set(0.0f);
    for (std::int64_t s = 0; s < pitch; s += Vec::width) {
        const Vec weight = exp(load(scores + s) - set(highest));
        store(scores + s, weight);
        total = total + weight;
    }
    return sum(total);
}

// to[h * padded + c] = sum_s weights[h * pitch + s] v_s[c], two vectors of columns at a time.
template <int H>
void mix(const Rows& v, const float* weights, std::int64_t pitch, std::int64_t keys, float* to, int padded) {
    for (int c = 0; c < v.width; c += 2 * Vec::width) {
        const bool both = c + Vec::width < v.width;
        Vec low[H], high[H];
        for (int h = 0; h < H; ++h) low[h] = high[h] = set(0.0f);
        for (std::int64_t s = 0; s < keys; ++s) {
            const Vec first = v(s, c), second = both ? v(s, c + Vec::width) : set(0.0f);
            for (int h = 0; h < H; ++h) {
                const Vec weight = set(weights[h * pitch + s]);
                low[h] = fma(weight, first, low[h]), high[h] = fma(weight, second, high[h]);
            }
        }
        for (int h = 0; h < H; ++h) {
            store(to + h * padded + c, low[h]);
            if (both) store(to + h * padded + c + Vec::width, high[h]);
        }
    }
}

template <int H>
void attend(const DecodeAttentionArgs& a, std::int64_t b, std::int64_t first_head, const Rows& k, const Rows& v) {
    const int q_padded = round_up(a.key_dim), out_padded = round_up(a.value_dim);
    const std::int64_t pitch = round_up(a.keys);
    const Scratch scratch(H * (q_padded + out_padded + pitch));
    float* const q = scratch.data;
    float* const out = q + H * q_padded;
    float* const scores = out + H * out_padded;
    load_tile(q, q_padded, a.q, b * a.q.stride[0] + first_head * a.q.stride[1], 1, a.q.stride[1], static_cast<int>(a.key_dim), H);
    for (int i = 0; i < H * q_padded; ++i) q[i] *= a.scale;
    score<H>(k, q, q_padded, a.keys, scores, pitch);
    float total[H];
    for (int h = 0; h < H; ++h) total[h] = weigh(scores + h * pitch, a.keys, pitch);
    mix<H>(v, scores, pitch, a.keys, out, out_padded);
    for (int h = 0; h < H; ++h)
        for (int c = 0; c < out_padded; ++c) out[h * out_padded + c] /= total[h];
    store_tile(out, out_padded, a.out, b * a.out.stride[0] + first_head * a.out.stride[1], 1, a.out.stride[1], static_cast<int>(a.value_dim), H);
}

inline void run(const DecodeAttentionArgs& a) {
    using Attend = void(const DecodeAttentionArgs&, std::int64_t, std::int64_t, const Rows&, const Rows&);
    constexpr Attend* kAttend[kHeads + 1] = {nullptr, attend<1>, attend<2>, attend<3>, attend<4>, attend<5>, attend<6>, attend<7>, attend<8>};
    const std::int64_t shared_by = a.heads / a.groups;  // query heads of a group
    const int threads = worthwhile_threads(a.n_threads, a.batch * a.heads * a.keys * (a.key_dim + a.value_dim));
    parallel_for(a.batch * a.groups, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t b = item / a.groups, g = item % a.groups;
            const auto rows = [&](const View& t, std::int64_t width) {
                return Rows{t.data, t.dtype, b * t.stride[0] + g * t.stride[1], t.stride[2], static_cast<int>(width)};
            };
            for (std::int64_t h = 0; h < shared_by; h += kHeads) {
                const std::int64_t together = shared_by - h < kHeads ? shared_by - h : kHeads;
                kAttend[together](a, b, g * shared_by + h, rows(a.k, a.key_dim), rows(a.v, a.value_dim));
            }
        }
    });
}

}  // namespace
}  // namespace klfast
