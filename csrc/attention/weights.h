// What every way to attend needs: which keys a query sees, and the weights that scores become.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/decode_attention.h"
#include "simd/tile_io.h"

namespace klfast {
namespace {

// A query, which sees the keys before `keys`, but of those before `from` only the sinks.
struct Query {
    std::int64_t token, head, keys, from;
};

// The softmax of a query's scores, which come in parts.
struct Softmax {
    float highest = -__builtin_inff(), total = 0.0f;

    // Scores of keys [first, first + keys) become weights, not normalised: 0 for keys that the query does not see, and
    // between keys and pitch, which is a multiple of kLanes. Returns what to multiply with what came before.
    float weigh(const Query& query, std::int64_t sinks, std::int64_t first, std::int64_t keys, std::int64_t pitch,
                float* scores) {
        const auto hide = [&](std::int64_t from, std::int64_t to) {
            for (std::int64_t s = larger(from, 0); s < to; ++s) scores[s] = -__builtin_inff();
        };
        hide(sinks - first, smaller(query.from - first, keys));
        hide(smaller(query.keys - first, keys), pitch);
        Vec most = set(highest);  // a NaN is none, but makes the total one
        for (std::int64_t s = 0; s < pitch; s += kLanes) most = max(most, load(scores + s));
        const float before = highest;
        highest = highest_of(most);
        const Vec shift = set(highest == -__builtin_inff() ? 0.0f : highest);  // if none is seen, all weights are 0
        Vec sums = set(0.0f);
        for (std::int64_t s = 0; s < pitch; s += kLanes) {
            const Vec weight = exp(load(scores + s) - shift);
            store(scores + s, weight);
            sums = sums + weight;
        }
        const float old = before == highest ? 1.0f : std::exp(before - highest);
        total = total * old + sum(sums);
        return old;
    }

  private:
    static float highest_of(Vec v) {
        float lanes[kLanes];
        store(lanes, v);
        float most = lanes[0];
        for (const float lane : lanes) most = lane > most ? lane : most;
        return most;
    }
};

}  // namespace
}  // namespace klfast
