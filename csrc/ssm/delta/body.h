// The gated delta rule over Vec, a few tokens at a time. Columns of the state are independent, so some of them stay in
// L1 while the tokens of a chunk pass over them, kBlock together, twice: once to read what the state holds for their
// keys and queries, once to write. Within such a block, with e_t the decay at t and R_ts = e_(s+1) .. e_t,
//     (e_t S_(t-1))^T k_t = S_0^T (R_t0 k_t) + sum over s < t of (R_ts k_s . k_t) d_s
//     S_t^T q_t           = S_0^T (R_t0 q_t) + sum over s <= t of (R_ts k_s . q_t) d_s
//     S_T                 = R_T0 S_0 + sum over s of (R_Ts k_s) d_s^T,
// where d_s is what is added along k_s. T tokens cost 2 T + T + 1 operations an element of the state, and no quotient
// of decays is taken, which might be 0 / 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/parallel.h"
#include "simd/tile_io.h"
#include "simd/unrolled.h"
#include "ssm/delta/gated_delta_rule.h"

namespace klfast {
namespace {

constexpr int kBlock = kLanes >= 16 ? 4 : 2;  // tokens that pass together
constexpr std::int64_t kTokens = 32;          // of a chunk, whole blocks: its vectors fit in L2
constexpr int kWide = kLanes >= 16 ? 2 : 3;   // vectors of columns that pass together
constexpr int kLine = 16;                     // floats of a line of the cache
constexpr float kNormEps = 1e-6f;             // as in the package fla

// T tokens as the state meets them. Factors of key channel i and vector j (R_t0 k_t of each t, R_t0 q_t of each t, R_Ts
// k_s of each s, R_T0) are at factors[i * kRow + j]; those of one token, which is not worth a transpose, at [j * wide_k
// + i].
template <int T>
struct Block {
    static constexpr int kVectors = 3 * T + 1;
    static constexpr int kRow = T == 1 ? 1 : static_cast<int>((kVectors + kLanes - 1) / kLanes * kLanes);
    const float* factors;
    std::int64_t wide_k;
    float to_key[T][T], to_query[T][T];  // [t][s]
    float beta[T];

    Vec factor(std::int64_t i, int j) const { return set(factors[T == 1 ? j * wide_k + i : i * kRow + j]); }
};

// N vectors of columns of S [key_dim, pitch], and of v and out [T, wide_v]. A single token, which is as fast as memory,
// asks meanwhile for as much of `ahead`, line after line: columns alone lie too far apart for the processor to guess.
template <int T, int N>
inline void pass(float* s, std::int64_t pitch, std::int64_t key_dim, const Block<T>& b, const float* v, float* out,
                 std::int64_t wide_v, const float* ahead) {
    Vec read[2 * T][N], added[T][N];
    unrolled<2 * T>([&](int j) KLFAST_INLINE { unrolled<N>([&](int n) KLFAST_INLINE { read[j][n] = set(0.0f); }); });
    for (std::int64_t i = 0; i < key_dim; ++i) {
        Vec x[N];
        if constexpr (T == 1)
            for (int at = 0; at < N * kLanes; at += kLine) __builtin_prefetch(ahead + i * N * kLanes + at, 0, 2);
        unrolled<N>([&](int n) KLFAST_INLINE { x[n] = load(s + i * pitch + n * kLanes); });
        unrolled<2 * T>([&](int j) KLFAST_INLINE {
            const Vec factor = b.factor(i, j);
            unrolled<N>([&](int n) KLFAST_INLINE { read[j][n] = fma(x[n], factor, read[j][n]); });
        });
    }
    unrolled<T>([&](int t) KLFAST_INLINE {
        unrolled<N>([&](int n) KLFAST_INLINE {
            Vec held = read[t][n], y = read[T + t][n];
            unrolled<T>([&](int before) KLFAST_INLINE {
                if (before >= t) return;
                held = fma(set(b.to_key[t][before]), added[before][n], held);
                y = fma(set(b.to_query[t][before]), added[before][n], y);
            });
            added[t][n] = (load(v + t * wide_v + n * kLanes) - held) * set(b.beta[t]);
            store(out + t * wide_v + n * kLanes, fma(set(b.to_query[t][t]), added[t][n], y));
        });
    });
    for (std::int64_t i = 0; i < key_dim; ++i) {
        Vec x[N];
        unrolled<N>([&](int n) KLFAST_INLINE { x[n] = load(s + i * pitch + n * kLanes) * b.factor(i, 3 * T); });
        unrolled<T>([&](int t) KLFAST_INLINE {
            const Vec factor = b.factor(i, 2 * T + t);
            unrolled<N>([&](int n) KLFAST_INLINE { x[n] = fma(factor, added[t][n], x[n]); });
        });
        unrolled<N>([&](int n) KLFAST_INLINE { store(s + i * pitch + n * kLanes, x[n]); });
    }
}

// Multiplies k and q [padded] by 1 and `scale` and, if `normalize`, divides them by their norms.
inline void scale_both(float* k, float* q, std::int64_t padded, bool normalize, float scale) {
    float scale_k = 1.0f, scale_q = scale;
    if (normalize) {
        Vec kk = set(0.0f), qq = set(0.0f);
        for (std::int64_t i = 0; i < padded; i += kLanes) {
            kk = fma(load(k + i), load(k + i), kk);
            qq = fma(load(q + i), load(q + i), qq);
        }
        scale_k /= std::sqrt(sum(kk) + kNormEps);
        scale_q /= std::sqrt(sum(qq) + kNormEps);
    }
    for (std::int64_t i = 0; i < padded; i += kLanes) {
        store(k + i, load(k + i) * set(scale_k));
        store(q + i, load(q + i) * set(scale_q));
    }
}

// A chunk of tokens of one head: rows of wide_k or wide_v floats.
struct Chunk {
    const float *k, *q;     // [count, wide_k]
    const float* decay;     // [count, wide_k], or [count] if not by_channel
    const float *v, *beta;  // [count, wide_v], [count]
    float* out;             // [count, wide_v]
    std::int64_t count, key_dim, wide_k, wide_v;
    bool by_channel;
};

// Fills a block with the T tokens from `first` on; vectors [3 T + 1, wide_k] and factors [key_dim, kRow] are its
// memory.
template <int T>
inline void prepare(Block<T>& b, const Chunk& c, std::int64_t first, float* vectors, float* factors) {
    const std::int64_t wide = c.wide_k, at = first * wide;
    Vec to_key[T][T], to_query[T][T];
    unrolled<T>([&](int t) KLFAST_INLINE {
        unrolled<T>([&](int s) KLFAST_INLINE { to_key[t][s] = to_query[t][s] = set(0.0f); });
    });
    for (std::int64_t i = 0; i < wide; i += kLanes) {
        Vec r = set(1.0f), after[T];  // R_t0, and R_ts k_s of each s
        unrolled<T>([&](int t) KLFAST_INLINE {
            const Vec k = load(c.k + at + t * wide + i), q = load(c.q + at + t * wide + i);
            const Vec e = c.by_channel ? load(c.decay + at + t * wide + i) : set(c.decay[first + t]);
            r = r * e;
            store(vectors + t * wide + i, k * r);
            store(vectors + (T + t) * wide + i, q * r);
            after[t] = k;
            to_query[t][t] = fma(k, q, to_query[t][t]);
            unrolled<T>([&](int s) KLFAST_INLINE {
                if (s >= t) return;
                after[s] = after[s] * e;
                to_key[t][s] = fma(after[s], k, to_key[t][s]);
                to_query[t][s] = fma(after[s], q, to_query[t][s]);
            });
        });
        unrolled<T>([&](int s) KLFAST_INLINE { store(vectors + (2 * T + s) * wide + i, after[s]); });
        store(vectors + 3 * T * wide + i, r);
    }
    unrolled<T>([&](int t) KLFAST_INLINE {
        unrolled<T>([&](int s) KLFAST_INLINE {
            if (s < t) b.to_key[t][s] = sum(to_key[t][s]);
            if (s <= t) b.to_query[t][s] = sum(to_query[t][s]);
        });
        b.beta[t] = c.beta[first + t];
    });
    b.wide_k = wide;
    b.factors = vectors;
    if constexpr (T > 1) {
        const View rows{.data = vectors, .dtype = DType::f32, .stride = {}};
        load_tile(factors, Block<T>::kRow, rows, 0, wide, 1, Block<T>::kVectors, c.key_dim);
        b.factors = factors;
    }
}

// Memory of one thread for a chunk of `most` tokens.
struct Scratch {
    const std::int64_t wide_v;
    const bool in_place;  // the state can be used where it lies
    Buffer<float> floats;
    float *k, *q, *decay;  // [most, wide_k]
    float *v, *out;        // [most, wide_v]
    float* beta;           // [most], and the rest of the last vector
    float* vectors;        // [most, 4, wide_k]: those of tokens alone stay there
    float* factors;        // [blocks, key_dim, row]
    float* state;          // [heads of a head of keys, key_dim, wide_v], if it is not used in place
    Block<kBlock> blocks[kTokens / kBlock];
    Block<1> singles[kBlock];  // those that no block takes

    explicit Scratch(const GatedDeltaRuleArgs& a)
        : wide_v(round_up(a.value_dim, kLanes)),
          in_place(a.state.dtype == DType::f32 && a.state.stride[3] == 1 && wide_v == a.value_dim),
          floats(size(a)) {
        const std::int64_t most = smaller(kTokens, a.length), wide_k = round_up(a.key_dim, kLanes);
        float* next = floats.data;
        const auto take = [&](std::int64_t n) { return (next += n) - n; };
        k = take(most * wide_k), q = take(most * wide_k), decay = take(most * wide_k + kLanes);
        v = take(most * wide_v), out = take(most * wide_v), beta = take(most + kLanes);
        vectors = take(4 * most * wide_k), factors = take(most / kBlock * a.key_dim * Block<kBlock>::kRow);
        state = next;
    }

    std::int64_t size(const GatedDeltaRuleArgs& a) const {
        const std::int64_t most = smaller(kTokens, a.length), wide_k = round_up(a.key_dim, kLanes);
        return 7 * most * wide_k + 2 * most * wide_v + most + 2 * kLanes +
               most / kBlock * a.key_dim * Block<kBlock>::kRow +
               (in_place ? 0 : a.heads / a.key_heads * a.key_dim * wide_v);
    }
};

// The tokens of a chunk: whole blocks, then those that are left one by one; `next` is the state that is used after s.
inline void run_chunk(float* s, std::int64_t pitch, const Chunk& c, Scratch& m, const float* next) {
    const std::int64_t n_blocks = c.count / kBlock, n_singles = c.count % kBlock, first_single = n_blocks * kBlock;
    for (std::int64_t i = 0; i < n_blocks; ++i)
        prepare(m.blocks[i], c, i * kBlock, m.vectors, m.factors + i * c.key_dim * Block<kBlock>::kRow);
    for (std::int64_t i = 0; i < n_singles; ++i)
        prepare(m.singles[i], c, first_single + i, m.vectors + 4 * (first_single + i) * c.wide_k, nullptr);
    std::int64_t column = 0;
    const auto columns = [&](auto vectors) {
        constexpr int n = decltype(vectors)::value;
        for (; column + n * kLanes <= c.wide_v; column += n * kLanes) {
            const auto at = [&](const float* rows, std::int64_t t) { return rows + t * c.wide_v + column; };
            for (std::int64_t i = 0; i < n_blocks; ++i)
                pass<kBlock, n>(s + column, pitch, c.key_dim, m.blocks[i], at(c.v, i * kBlock),
                                c.out + i * kBlock * c.wide_v + column, c.wide_v, next);
            for (std::int64_t i = first_single; i < c.count; ++i)
                pass<1, n>(s + column, pitch, c.key_dim, m.singles[i - first_single], at(c.v, i),
                           c.out + i * c.wide_v + column, c.wide_v, next + column * c.key_dim);
        }
    };
    if (!n_blocks) columns(std::integral_constant<int, 4>());
    columns(std::integral_constant<int, kWide>());
    columns(std::integral_constant<int, 1>());
}

// Rows of a chunk of [batch, length, heads, dim] as floats.
inline void load_rows(float* to, std::int64_t width, const View& from, std::int64_t batch, std::int64_t first,
                      std::int64_t head, std::int64_t size, std::int64_t count) {
    const std::int64_t base = batch * from.stride[0] + first * from.stride[1] + head * from.stride[2];
    load_tile(to, width, from, base, from.stride[3], from.stride[1], size, count);
}

// The same of [batch, length, heads], one number a token.
inline void load_numbers(float* to, const View& from, std::int64_t batch, std::int64_t first, std::int64_t head,
                         std::int64_t count) {
    const std::int64_t base = batch * from.stride[0] + first * from.stride[1] + head * from.stride[2];
    load_tile(to, 0, from, base, from.stride[1], 0, count, 1);
}

// The heads [begin, end) of one sequence that share a head of keys: a chunk's keys and queries are loaded once for
// them.
inline void run_heads(const GatedDeltaRuleArgs& a, std::int64_t batch, std::int64_t begin, std::int64_t end,
                      Scratch& m) {
    const std::int64_t wide_k = round_up(a.key_dim, kLanes), wide_v = round_up(a.value_dim, kLanes);
    const std::int64_t key_head = begin / (a.heads / a.key_heads);
    const bool by_channel = a.g.stride[3] != 0;
    const auto state_base = [&](std::int64_t head) { return batch * a.state.stride[0] + head * a.state.stride[1]; };
    const auto state = [&](std::int64_t head) {
        return m.in_place ? static_cast<float*>(a.state.data) + state_base(head)
                          : m.state + (head - begin) * a.key_dim * wide_v;
    };
    const std::int64_t pitch = m.in_place ? a.state.stride[2] : wide_v;
    if (!m.in_place)
        for (std::int64_t head = begin; head < end; ++head)
            load_tile(state(head), pitch, a.state, state_base(head), a.state.stride[3], a.state.stride[2], a.value_dim,
                      a.key_dim);
    for (std::int64_t first = 0; first < a.length; first += kTokens) {
        const std::int64_t count = smaller(kTokens, a.length - first);
        load_rows(m.k, wide_k, a.k, batch, first, key_head, a.key_dim, count);
        load_rows(m.q, wide_k, a.q, batch, first, key_head, a.key_dim, count);
        for (std::int64_t t = 0; t < count; ++t)
            scale_both(m.k + t * wide_k, m.q + t * wide_k, wide_k, a.normalize, a.scale);
        for (std::int64_t head = begin; head < end; ++head) {
            load_rows(m.v, wide_v, a.v, batch, first, head, a.value_dim, count);
            load_numbers(m.beta, a.beta, batch, first, head, count);
            if (by_channel)
                load_rows(m.decay, wide_k, a.g, batch, first, head, a.key_dim, count);
            else
                load_numbers(m.decay, a.g, batch, first, head, count);
            for (std::int64_t i = 0; i < (by_channel ? count * wide_k : count); i += kLanes)
                store(m.decay + i, exp(load(m.decay + i)));
            const Chunk chunk{.k = m.k,
                              .q = m.q,
                              .decay = m.decay,
                              .v = m.v,
                              .beta = m.beta,
                              .out = m.out,
                              .count = count,
                              .key_dim = a.key_dim,
                              .wide_k = wide_k,
                              .wide_v = wide_v,
                              .by_channel = by_channel};
            run_chunk(state(head), pitch, chunk, m, state(m.in_place && head + 1 < a.heads ? head + 1 : head));
            const std::int64_t out_base = batch * a.out.stride[0] + first * a.out.stride[1] + head * a.out.stride[2];
            store_tile(m.out, wide_v, a.out, out_base, a.out.stride[3], a.out.stride[1], a.value_dim, count);
        }
    }
    if (!m.in_place)
        for (std::int64_t head = begin; head < end; ++head)
            store_tile(state(head), pitch, a.state, state_base(head), a.state.stride[3], a.state.stride[2], a.value_dim,
                       a.key_dim);
}

inline void run(const GatedDeltaRuleArgs& a) {
    const int threads = worthwhile_threads(a.n_threads, 8.0 * a.batch * a.heads * a.length * a.key_dim * a.value_dim);
    const std::int64_t per_key_head = a.heads / a.key_heads;
    parallel_for(a.batch * a.heads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        Scratch m(a);
        while (begin < end) {
            const std::int64_t next = smaller(end, round_up(begin + 1, per_key_head));
            run_heads(a, begin / a.heads, begin % a.heads, (next - 1) % a.heads + 1, m);
            begin = next;
        }
    });
}

}  // namespace
}  // namespace klfast
