// Shapes come from klfast/backends/cpu/ssm.py, which also allocates. No arithmetic.
#include "python/bind_ssm.h"

#include <cstdint>

#include "ssm/conv/causal_conv1d.h"
#include "norm/rms_norm.h"
#include "ssm/scan/scan.h"
#include "python/view_caster.h"

namespace py = pybind11;

namespace klfast {

void bind_ssm(py::module_& m) {
    using Int = std::int64_t;
    m.def("selective_scan", [](View u, View delta, View a, View b, View c, View d, View z, View delta_bias,
                               View initial, View out, View state, Int batch, Int channels, Int length, Int groups,
                               Int states, bool softplus, int n_threads, int limit) {
        const py::gil_scoped_release release;
        selective_scan({u, delta, z, out, a, b, c, d, delta_bias, initial, state, batch, channels, length, groups,
                        states, softplus, n_threads},
                       static_cast<Tier>(limit));
    });
    m.def("selective_state_update", [](View state, View x, View dt, View a, View b, View c, View d, View z,
                                       View dt_bias, View out, Int batch, Int heads, Int dim, Int groups, Int states,
                                       bool softplus, int n_threads, int limit) {
        const py::gil_scoped_release release;
        selective_state_update(
            {state, x, dt, z, out, a, b, c, d, dt_bias, batch, heads, dim, groups, states, softplus, false, n_threads},
            static_cast<Tier>(limit));
    });
    m.def("mamba_chunk_scan", [](View x, View dt, View a, View b, View c, View d, View z, View dt_bias, View initial,
                                 View final, View out, Int batch, Int length, Int heads, Int dim, Int groups,
                                 Int states, bool softplus, float dt_min, float dt_max, int n_threads, int limit) {
        const py::gil_scoped_release release;
        mamba_chunk_scan({x,     z,      out,   dt,  a,      dt_bias, b,        c,      d,      initial,  final,
                          batch, length, heads, dim, groups, states,  softplus, dt_min, dt_max, n_threads},
                         static_cast<Tier>(limit));
    });
    m.def("causal_conv1d",
          [](View x, View weight, View bias, View initial, View final, View out, Int batch, Int channels, Int length,
             Int width, Int initial_length, Int final_length, bool silu, int n_threads, int limit) {
              const py::gil_scoped_release release;
              causal_conv1d({x, out, weight, bias, initial, final, batch, channels, length, width, initial_length,
                             final_length, silu, n_threads},
                            static_cast<Tier>(limit));
          });
    m.def("rms_norm", [](View x, View weight, View gate, View out, Int rows, Int rows_inner, Int channels,
                         Int group_size, float eps, int n_threads, int limit) {
        const py::gil_scoped_release release;
        rms_norm({x, gate, out, weight, rows, rows_inner, channels, group_size, eps, n_threads},
                 static_cast<Tier>(limit));
    });
}

}  // namespace klfast
