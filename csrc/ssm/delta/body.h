// The gated delta rule over Vec, token by token. Columns of the state are independent, so a block of them stays in L1
// while the tokens of a chunk pass over it twice: once to read S^T k and S^T q, once to write the new S. That q sees
// the new state costs no third pass: S_t^T q = S^T (e q) + (q.k) d, where d is what is added along k and e the decay.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/parallel.h"
#include "simd/tile_io.h"
#include "ssm/delta/gated_delta_rule.h"

namespace klfast {
namespace {

constexpr std::int64_t kTokens = 32;  // of a chunk: its vectors and a block of the state fit in L2
constexpr float kNormEps = 1e-6f;     // as in the package fla

// One token as the state meets it. Vectors over key channels: k, k and q times the decay, the decay.
struct Token {
    const float *k, *decayed_k, *decayed_q, *decay;
    float head_decay;  // instead of `decay`, where all channels share one
    float qk, beta;
};

// A block of `kVectors` vectors of columns of S [key_dim, pitch], of v and of out.
template <int kVectors, bool kByChannel>
inline void pass(float* s, std::int64_t pitch, std::int64_t key_dim, const Token& t, const float* v, float* out) {
    Vec read_k[kVectors], read_q[kVectors];
    for (int n = 0; n < kVectors; ++n) read_k[n] = read_q[n] = set(0.0f);
    for (std::int64_t i = 0; i < key_dim; ++i) {
        const Vec k = set(t.decayed_k[i]), q = set(t.decayed_q[i]);
        for (int n = 0; n < kVectors; ++n) {
            const Vec x = load(s + i * pitch + n * kLanes);
            read_k[n] = fma(x, k, read_k[n]);
            read_q[n] = fma(x, q, read_q[n]);
        }
    }
    Vec delta[kVectors];
    for (int n = 0; n < kVectors; ++n) {
        delta[n] = (load(v + n * kLanes) - read_k[n]) * set(t.beta);
        store(out + n * kLanes, fma(set(t.qk), delta[n], read_q[n]));
    }
    Vec decay = set(t.head_decay);
    for (std::int64_t i = 0; i < key_dim; ++i) {
        const Vec k = set(t.k[i]);
        if (kByChannel) decay = set(t.decay[i]);
        for (int n = 0; n < kVectors; ++n) {
            float* const x = s + i * pitch + n * kLanes;
            store(x, fma(k, delta[n], load(x) * decay));
        }
    }
}

template <bool kByChannel>
inline void run_tokens(float* s, std::int64_t pitch, std::int64_t key_dim, std::int64_t wide_v, const Token* tokens,
                       std::int64_t count, const float* v, float* out) {
    std::int64_t c = 0;
    const auto columns = [&](auto vectors) {
        constexpr int n = decltype(vectors)::value;
        for (; c + n * kLanes <= wide_v; c += n * kLanes)
            for (std::int64_t t = 0; t < count; ++t)
                pass<n, kByChannel>(s + c, pitch, key_dim, tokens[t], v + t * wide_v + c, out + t * wide_v + c);
    };
    columns(std::integral_constant<int, 4>());
    columns(std::integral_constant<int, 1>());
}

// Multiplies x [padded] by `scale` and, if `normalize`, divides it by its norm.
inline void scale_key(float* x, std::int64_t padded, bool normalize, float scale) {
    if (normalize) {
        Vec squares = set(0.0f);
        for (std::int64_t i = 0; i < padded; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
        scale /= std::sqrt(sum(squares) + kNormEps);
    }
    for (std::int64_t i = 0; i < padded; i += kLanes) store(x + i, load(x + i) * set(scale));
}

inline void run(const GatedDeltaRuleArgs& a) {
    const std::int64_t wide_k = round_up(a.key_dim, kLanes), wide_v = round_up(a.value_dim, kLanes);
    const std::int64_t per_key_head = a.heads / a.key_heads, most = smaller(kTokens, a.length);
    const bool by_channel = a.g.stride[3] != 0;
    const bool in_place = a.state.dtype == DType::f32 && a.state.stride[3] == 1 && wide_v == a.value_dim;
    const std::int64_t pitch = in_place ? a.state.stride[2] : wide_v;
    const int threads = worthwhile_threads(a.n_threads, 8.0 * a.batch * a.heads * a.length * a.key_dim * a.value_dim);
    parallel_for(a.batch * a.heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t keys = most * wide_k, values = most * wide_v;
        const Buffer<float> scratch(5 * keys + 2 * values + (in_place ? 0 : a.key_dim * wide_v) + most + kLanes);
        const Buffer<Token> tokens(most);
        float* const k = scratch.data;             // [most, wide_k]
        float* const decayed_k = k + keys;         // [most, wide_k]
        float* const q = decayed_k + keys;         // [most, wide_k], times the scale
        float* const decayed_q = q + keys;         // [most, wide_k]
        float* const decay = decayed_q + keys;     // [most, wide_k]
        float* const v = decay + keys;             // [most, wide_v]
        float* const out = v + values;             // [most, wide_v]
        float* const beta = out + values;          // [most], and the rest of the last vector
        float* const copy = beta + most + kLanes;  // [key_dim, wide_v], where the state is not used in place
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t batch = item / a.heads, head = item % a.heads, key_head = head / per_key_head;
            const std::int64_t state_base = batch * a.state.stride[0] + head * a.state.stride[1];
            float* const s = in_place ? static_cast<float*>(a.state.data) + state_base : copy;
            if (!in_place)
                load_tile(s, pitch, a.state, state_base, a.state.stride[3], a.state.stride[2], a.value_dim, a.key_dim);
            for (std::int64_t first = 0; first < a.length; first += kTokens) {
                const std::int64_t count = smaller(kTokens, a.length - first);
                const auto rows = [&](float* to, std::int64_t width, const View& from, std::int64_t which,
                                      std::int64_t size) {
                    const std::int64_t base = batch * from.stride[0] + first * from.stride[1] + which * from.stride[2];
                    load_tile(to, width, from, base, from.stride[3], from.stride[1], size, count);
                };
                rows(k, wide_k, a.k, key_head, a.key_dim);
                rows(q, wide_k, a.q, key_head, a.key_dim);
                rows(v, wide_v, a.v, head, a.value_dim);
                rows(decay, wide_k, a.g, head, by_channel ? a.key_dim : 1);
                rows(beta, 1, a.beta, head, 1);
                for (std::int64_t t = 0; t < count; ++t) {
                    const std::int64_t row = t * wide_k;
                    scale_key(k + row, wide_k, a.normalize, 1.0f);
                    scale_key(q + row, wide_k, a.normalize, a.scale);
                    Vec qk = set(0.0f), e = exp(set(decay[row]));
                    for (std::int64_t i = row; i < row + wide_k; i += kLanes) {
                        if (by_channel) e = exp(load(decay + i)), store(decay + i, e);
                        qk = fma(load(q + i), load(k + i), qk);
                        store(decayed_k + i, load(k + i) * e);
                        store(decayed_q + i, load(q + i) * e);
                    }
                    float lanes[kLanes];
                    store(lanes, e);
                    tokens[t] = {.k = k + row,
                                 .decayed_k = decayed_k + row,
                                 .decayed_q = decayed_q + row,
                                 .decay = decay + row,
                                 .head_decay = lanes[0],
                                 .qk = sum(qk),
                                 .beta = beta[t]};
                }
                if (by_channel)
                    run_tokens<true>(s, pitch, a.key_dim, wide_v, tokens.data, count, v, out);
                else
                    run_tokens<false>(s, pitch, a.key_dim, wide_v, tokens.data, count, v, out);
                const std::int64_t out_base =
                    batch * a.out.stride[0] + first * a.out.stride[1] + head * a.out.stride[2];
                store_tile(out, wide_v, a.out, out_base, a.out.stride[3], a.out.stride[1], a.value_dim, count);
            }
            if (!in_place)
                store_tile(s, pitch, a.state, state_base, a.state.stride[3], a.state.stride[2], a.value_dim, a.key_dim);
        }
    });
}

}  // namespace
}  // namespace klfast
