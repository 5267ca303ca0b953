// Attention over Vec, in float32: queries that share a key head, of several heads or tokens, go together.
#pragma once

#include <cstdint>
#include <optional>

#include "attention/few_queries.h"
#include "attention/many_queries.h"
#include "core/parallel.h"

namespace klfast {
namespace {

constexpr int kMany = 32;  // queries of a key head, from which laying out its keys pays

inline void run(const DecodeAttentionArgs& a) {
    if (a.heads == 0) return;
    using Attend = void(const DecodeAttentionArgs&, std::int64_t, const Query*, const Rows&, const Rows&);
    constexpr Attend* kAttend[kHeads + 1] = {nullptr,   attend<1>, attend<2>, attend<3>, attend<4>,
                                             attend<5>, attend<6>, attend<7>, attend<8>};
    const std::int64_t shared_by = a.heads / a.groups;  // query heads of a group
    const bool many = a.length * shared_by >= kMany;
    const int limit = many ? kQueries : kHeads;
    // Tokens whose heads go together, and blocks of them.
    const std::int64_t tokens = larger(limit / shared_by, 1), blocks = (a.length + tokens - 1) / tokens;
    std::int64_t keys = a.keys;
    for (std::int64_t b = 0; a.keys_of && b < a.batch; ++b) keys = larger(keys, a.keys_of[b]);
    const int threads =
        worthwhile_threads(a.n_threads, 1.0 * a.batch * a.length * a.heads * keys * (a.key_dim + a.value_dim));
    parallel_for(a.batch * a.groups * blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        std::optional<ManyQueries> tiles;
        if (many) tiles.emplace(a);
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
            Query queries[kQueries];
            int count = 0;
            const auto flush = [&] {
                if (many)
                    tiles->attend(b, g, queries, count);
                else
                    kAttend[count](a, b, queries, rows(a.k, a.key_dim), rows(a.v, a.value_dim));
                count = 0;
            };
            for (std::int64_t token = first; token < last; ++token)
                for (std::int64_t h = 0; h < shared_by; ++h) {
                    const std::int64_t keys_seen = seen + token;
                    const std::int64_t from = a.window < 0 ? 0 : larger(keys_seen - 1 - a.window, 0);
                    queries[count++] = {.token = token, .head = g * shared_by + h, .keys = keys_seen, .from = from};
                    if (count == limit) flush();
                }
            if (count > 0) flush();
        }
    });
}

}  // namespace
}  // namespace klfast
