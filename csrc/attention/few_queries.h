// Attention of up to eight queries that share a key head: they go over its keys and values together, so that each is
// loaded and widened once. Scores stay in L1 or L2: as many floats as keys (kKeys at most) times queries.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/weights.h"

namespace klfast {
namespace {

constexpr int kHeads = 8;            // that go together at most
constexpr std::int64_t kKeys = 256;  // added up at a time, so that a long sum's rounding does not grow with it

// One key head's rows, or those of its values: `first` is the index of the first element, `stride` from row to row.
struct Rows {
    const void* data;
    DType dtype;
    std::int64_t first, stride, width;

    Vec operator()(std::int64_t row, std::int64_t column) const {
        return load(data, first + row * stride + column, dtype, lanes(width - column));
    }

    Rows from(std::int64_t row) const {
        return {.data = data, .dtype = dtype, .first = first + row * stride, .stride = stride, .width = width};
    }
};

// scores[h * pitch + s] = q_h . k_s, q [H, padded] with zeros behind its width.
template <int H>
void score(const Rows& k, const float* q, std::int64_t padded, std::int64_t keys, float* scores, std::int64_t pitch) {
    for (std::int64_t s = 0; s < keys; ++s) {
        Vec dot[H];
        for (int h = 0; h < H; ++h) dot[h] = set(0.0f);
        for (std::int64_t c = 0; c < padded; c += kLanes) {
            const Vec key = k(s, c);
            for (int h = 0; h < H; ++h) dot[h] = fma(load(q + h * padded + c), key, dot[h]);
        }
        for (int h = 0; h < H; ++h) scores[h * pitch + s] = sum(dot[h]);
    }
}

// to[h * padded + c] = old[h] to[h * padded + c] + sum_s weights[h * pitch + s] v_s[c], two vectors of columns at a
// time; without `old` what `to` held is ignored.
template <int H>
void mix(const Rows& v, const float* weights, std::int64_t pitch, std::int64_t keys, const float* old, float* to,
         std::int64_t padded) {
    for (std::int64_t c = 0; c < v.width; c += 2 * kLanes) {
        const bool both = c + kLanes < v.width;
        Vec low[H], high[H];
        for (int h = 0; h < H; ++h) low[h] = high[h] = set(0.0f);
        for (std::int64_t s = 0; s < keys; ++s) {
            const Vec first = v(s, c), second = both ? v(s, c + kLanes) : set(0.0f);
            for (int h = 0; h < H; ++h) {
                const Vec weight = set(weights[h * pitch + s]);
                low[h] = fma(weight, first, low[h]), high[h] = fma(weight, second, high[h]);
            }
        }
        for (int h = 0; h < H; ++h) {  // what came before is added last: a part's terms do not vanish beside a long sum
            float* const at = to + h * padded + c;
            store(at, old ? fma(load(at), set(old[h]), low[h]) : low[h]);
            if (both) store(at + kLanes, old ? fma(load(at + kLanes), set(old[h]), high[h]) : high[h]);
        }
    }
}

// Long sequences in parts of kKeys: when a part raises the highest score, what was summed before is scaled down to it.
// The queries are in the order of their keys.
template <int H>
void attend(const DecodeAttentionArgs& a, std::int64_t b, const Query* queries, const Rows& k, const Rows& v) {
    const std::int64_t q_padded = round_up(a.key_dim, kLanes), out_padded = round_up(a.value_dim, kLanes);
    const std::int64_t all = queries[H - 1].keys, part = smaller(all, kKeys), pitch = round_up(part, kLanes);
    const Buffer<float> scratch(H * (q_padded + out_padded + pitch));
    float* const q = scratch.data;
    float* const out = q + H * q_padded;
    float* const scores = out + H * out_padded;
    const auto at = [&](const View& view, int h) {
        return b * view.stride[0] + queries[h].token * view.stride[1] + queries[h].head * view.stride[2];
    };
    for (int h = 0; h < H; ++h) load_tile(q + h * q_padded, q_padded, a.q, at(a.q, h), 1, 0, a.key_dim, 1);
    for (std::int64_t i = 0; i < H * q_padded; ++i) q[i] *= a.scale;
    Softmax softmax[H];
    float old[H];
    bool begun = false;
    for (std::int64_t first = 0, keys; first < all; first += keys) {
        if (first >= a.sinks && first < queries[0].from) first = queries[0].from;  // nobody sees what lies between
        keys = smaller(all - first, part);
        if (first < a.sinks && a.sinks < queries[0].from) keys = smaller(keys, a.sinks - first);
        score<H>(k.from(first), q, q_padded, keys, scores, pitch);
        for (int h = 0; h < H; ++h)
            old[h] = softmax[h].weigh(queries[h], a.sinks, first, keys, pitch, scores + h * pitch);
        mix<H>(v.from(first), scores, pitch, keys, begun ? old : nullptr, out, out_padded);
        begun = true;
    }
    for (int h = 0; h < H; ++h)
        for (std::int64_t c = 0; c < out_padded; ++c) out[h * out_padded + c] /= softmax[h].total;
    for (int h = 0; h < H; ++h) store_tile(out + h * out_padded, out_padded, a.out, at(a.out, h), 1, 0, a.value_dim, 1);
}

}  // namespace
}  // namespace klfast
