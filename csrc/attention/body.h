// Attention over Vec, in float32: queries that share a key head, of several heads or tokens, go over its keys and
// values together, so that each is loaded and widened once. Scores stay in L1 or L2: as many floats as keys (kKeys at
// most) times heads.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/decode_attention.h"
#include "core/parallel.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

constexpr int kHeads = 8;                // that go together at most
constexpr std::int64_t kKeys = 1 << 16;  // whose scores are held at a time

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

// The highest of scores, or `highest`.
inline float highest_of(const float* scores, std::int64_t keys, float highest) {
    for (std::int64_t s = 0; s < keys; ++s) highest = scores[s] > highest ? scores[s] : highest;
    return highest;
}

// Scores of one head become weights, not normalised; returns their sum. What lies between keys and pitch becomes 0.
inline float weigh(float* scores, std::int64_t keys, std::int64_t pitch, float highest) {
    if (highest == -__builtin_inff())
        highest = 0.0f;  // all masked: weights of 0, and a total of 0 if no other part has more
    for (std::int64_t s = keys; s < pitch; ++s) scores[s] = -__builtin_inff();
    Vec total = set(0.0f);
    for (std::int64_t s = 0; s < pitch; s += kLanes) {
        const Vec weight = exp(load(scores + s) - set(highest));
        store(scores + s, weight);
        total = total + weight;
    }
    return sum(total);
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

// A query, which sees the keys before `keys`, but of those before `from` only the sinks.
struct Query {
    std::int64_t token, head, keys, from;
};

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
    float total[H] = {}, highest[H], old[H];
    for (int h = 0; h < H; ++h) highest[h] = -__builtin_inff();
    bool begun = false;
    for (std::int64_t first = 0, keys; first < all; first += keys) {
        if (first >= a.sinks && first < queries[0].from) first = queries[0].from;  // nobody sees what lies between
        keys = smaller(all - first, part);
        if (first < a.sinks && a.sinks < queries[0].from) keys = smaller(keys, a.sinks - first);
        score<H>(k.from(first), q, q_padded, keys, scores, pitch);
        for (int h = 0; h < H; ++h) {
            const Query& query = queries[h];
            for (std::int64_t s = larger(a.sinks - first, 0); s < smaller(query.from - first, keys); ++s)
                scores[h * pitch + s] = -__builtin_inff();
            const std::int64_t own = larger(smaller(query.keys - first, keys), 0);
            const float before = highest[h];
            highest[h] = highest_of(scores + h * pitch, own, before);
            old[h] = before == highest[h] ? 1.0f : std::exp(before - highest[h]);
            total[h] = total[h] * old[h] + weigh(scores + h * pitch, own, pitch, highest[h]);
        }
        mix<H>(v.from(first), scores, pitch, keys, begun ? old : nullptr, out, out_padded);
        begun = true;
    }
    for (int h = 0; h < H; ++h)
        for (std::int64_t c = 0; c < out_padded; ++c) out[h * out_padded + c] /= total[h];
    for (int h = 0; h < H; ++h) store_tile(out + h * out_padded, out_padded, a.out, at(a.out, h), 1, 0, a.value_dim, 1);
}

inline void run(const DecodeAttentionArgs& a) {
    using Attend = void(const DecodeAttentionArgs&, std::int64_t, const Query*, const Rows&, const Rows&);
    constexpr Attend* kAttend[kHeads + 1] = {nullptr,   attend<1>, attend<2>, attend<3>, attend<4>,
                                             attend<5>, attend<6>, attend<7>, attend<8>};
    const std::int64_t shared_by = a.heads / a.groups;  // query heads of a group
    // Tokens whose heads go together, and blocks of them.
    const std::int64_t tokens = larger(kHeads / shared_by, 1), blocks = (a.length + tokens - 1) / tokens;
    std::int64_t keys = a.keys;
    for (std::int64_t b = 0; a.keys_of && b < a.batch; ++b) keys = larger(keys, a.keys_of[b]);
    const int threads =
        worthwhile_threads(a.n_threads, 1.0 * a.batch * a.length * a.heads * keys * (a.key_dim + a.value_dim));
    parallel_for(a.batch * a.groups * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t b = item / (a.groups * blocks), g = item / blocks % a.groups, turn = item % blocks;
            // From both ends by turns: late tokens have more keys, and threads take neighbouring items.
            const std::int64_t first = (turn % 2 ? blocks - 1 - turn / 2 : turn / 2) * tokens,
                               last = smaller(first + tokens, a.length);
            const auto rows = [&](const View& t, std::int64_t width) {
                return Rows{
                    .data = t.data,
                    .dtype = t.dtype,
                    .first = b * t.stride[0] + g * t.stride[1],
                    .stride = t.stride[2],
                    .width = width,
                };
            };
            const std::int64_t seen = (a.keys_of ? a.keys_of[b] : a.keys) - a.length + 1;  // by the first token
            Query queries[kHeads];
            int count = 0;
            const auto flush = [&] {
                if (count > 0) kAttend[count](a, b, queries, rows(a.k, a.key_dim), rows(a.v, a.value_dim));
                count = 0;
            };
            for (std::int64_t token = first; token < last; ++token)
                for (std::int64_t h = 0; h < shared_by; ++h) {
                    const std::int64_t keys_seen = seen + token;
                    const std::int64_t from = a.window < 0 ? 0 : larger(keys_seen - 1 - a.window, 0);
                    queries[count++] = {.token = token, .head = g * shared_by + h, .keys = keys_seen, .from = from};
                    if (count == kHeads) flush();
                }
            flush();
        }
    });
}

}  // namespace
}  // namespace klfast
