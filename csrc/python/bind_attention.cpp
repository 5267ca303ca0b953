// Tensors are checked by klfast/dispatch/registry.py; klfast/backends/cpu/matmul.py passes them and allocates the
// result. No arithmetic.
#include "attention/decode_attention.h"
#include "python/bindings.h"
#include "python/view_caster.h"

namespace klfast {

void bind_attention(pybind11::module_& m) {
    m.def("decode_attention", [](View q, View k, View v, View out, Int batch, Int heads, Int groups, Int keys,
                                 Int key_dim, Int value_dim, float scale, int n_threads, int limit) {
        const pybind11::gil_scoped_release release;
        const auto one_token = [](View view) {  // [batch, heads, width] as [batch, 1, heads, width]
            view.stride[3] = view.stride[2], view.stride[2] = view.stride[1], view.stride[1] = 0;
            return view;
        };
        const DecodeAttentionArgs args{
            .q = one_token(q),
            .k = k,
            .v = v,
            .out = one_token(out),
            .batch = batch,
            .length = 1,
            .heads = heads,
            .groups = groups,
            .keys = keys,
            .key_dim = key_dim,
            .value_dim = value_dim,
            .scale = scale,
            .n_threads = n_threads,
        };
        decode_attention(args, static_cast<Tier>(limit));
    });
}

}  // namespace klfast
