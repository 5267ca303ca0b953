// decode_attention against softmax and sums in double, for one query a head, several and many, with and without
// windows.
#include <algorithm>
#include <cmath>

#include "attention/decode_attention.h"
#include "check.h"

namespace klfast::test {
namespace {

void check(DType dtype, Int shared_by, Int keys, Int length, bool windowed, Int key_dim = 19) {
    constexpr Int batch = 2, groups = 2, value_dim = 37;
    const Int heads = groups * shared_by, fewer = length < keys ? 1 : 0;
    const Int window = windowed ? 3 : -1, sinks = windowed ? 2 : 0;
    const Int keys_of[batch] = {keys, keys - fewer};  // seen by the last query of each sequence
    Tensor q = Tensor::random(dtype, {batch, length, heads, key_dim}),
           k = Tensor::random(dtype, {batch, groups, keys, key_dim}),
           v = Tensor::random(dtype, {batch, groups, keys, value_dim});
    std::vector<double> truth(batch * length * heads * value_dim), weight(keys);
    for (Int row = 0; row < batch * length * heads; ++row) {
        const Int b = row / (length * heads), t = row / heads % length, h = row % heads;
        const Int group = b * groups + h / shared_by, seen = keys_of[b] - (length - 1 - t);
        double total = 0;
        for (Int s = 0; s < seen; ++s) {
            weight[s] = 0;
            if (windowed && s < seen - 1 - window && s >= sinks) continue;
            double dot = 0;
            for (Int c = 0; c < key_dim; ++c) dot += q[row * key_dim + c] * k[(group * keys + s) * key_dim + c];
            total += weight[s] = std::exp(0.3 * dot);
        }
        for (Int s = 0; s < seen; ++s)
            for (Int c = 0; c < value_dim; ++c)
                truth[row * value_dim + c] += weight[s] / total * v[(group * keys + s) * value_dim + c];
    }
    for_tiers("decode_attention", [&](Tier tier) {
        Tensor out(dtype, {batch, length, heads, value_dim});
        const DecodeAttentionArgs args{
            .q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .out = out.view(),
            .batch = batch,
            .length = length,
            .heads = heads,
            .groups = groups,
            .keys = keys,
            .key_dim = key_dim,
            .value_dim = value_dim,
            .keys_of = keys_of,
            .window = window,
            .sinks = sinks,
            .scale = 0.3f,
            .n_threads = kThreads,
        };
        call([&] { decode_attention(args, tier); });
        compare("decode_attention", tier, out, truth);
    });
}

}  // namespace

void check_attention() {
    for (const DType dtype : kTypes)
        for (const Int shared_by : {1, 3, 9})
            for (const Int keys : {1, 5, 131})
                for (const Int length : {Int{1}, std::min<Int>(keys, 5)})
                    for (const bool windowed : {false, true}) check(dtype, shared_by, keys, length, windowed);
    for (const Int shared_by : {1, 3})  // many queries, and more keys than are laid out at a time
        for (const bool windowed : {false, true}) check(DType::f32, shared_by, 600, 77, windowed, 300);
    check(DType::f32, 130, 300, 3, false);
}

}  // namespace klfast::test
