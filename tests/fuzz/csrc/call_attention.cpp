#include <algorithm>
#include <limits>

#include "attention/decode_attention.h"
#include "calls.h"
#include "operand.h"

namespace klfast::fuzz {

void call_decode_attention(Input& input, How how) {
    const Int length = input.size(40), keys = input.size(600, std::max<Int>(length, 1)), key_dim = input.size(300),
              shared_by = input.size(120), groups = input.size(3, 1), value_dim = input.size(80), batch = input.size(3),
              heads = groups * shared_by;
    const Operand q = Operand::read(input, {batch, length, heads, key_dim}, Strides::rows),
                  k = Operand::read(input, {batch, groups, keys, key_dim}, Strides::rows),
                  v = Operand::read(input, {batch, groups, keys, value_dim}, Strides::rows),
                  out = Operand::written(input, {batch, length, heads, value_dim}, Strides::rows);
    std::vector<Int> keys_of(batch);
    for (Int& count : keys_of) count = std::max<Int>(length, 1) + input.index(keys - std::max<Int>(length, 1) + 1);
    decode_attention(
        {
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
            .keys_of = input.flag() ? keys_of.data() : nullptr,
            .window = input.flag() ? input.index(keys + 2) : -1,
            .sinks = input.index(9),
            .scale = input.one_of({0.3f, -2.0f, 0.0f, 1e30f, std::numeric_limits<float>::quiet_NaN()}),
            .n_threads = how.n_threads,
        },
        how.limit);
}

}  // namespace klfast::fuzz
