// Tensors are checked by klfast/dispatch/registry.py; klfast/backends/cpu/matmul.py passes them and allocates the
// result. No arithmetic.
#include "python/bind_attention.h"

#include <cstdint>

#include "attention/decode_attention.h"
#include "python/view_caster.h"

namespace klfast {

void bind_attention(pybind11::module_& m) {
    using Int = std::int64_t;
    m.def("decode_attention", [](View q, View k, View v, View out, Int batch, Int heads, Int groups, Int keys,
                                 Int key_dim, Int value_dim, float scale, int n_threads, int limit) {
        const pybind11::gil_scoped_release release;
        decode_attention({q, k, v, out, batch, heads, groups, keys, key_dim, value_dim, scale, n_threads},
                         static_cast<Tier>(limit));
    });
}

}  // namespace klfast
