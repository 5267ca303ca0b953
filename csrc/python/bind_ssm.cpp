// Shapes come from klfast/backends/cpu/ssm.py, which also allocates. No arithmetic.
#include "ssm/conv/causal_conv1d.h"
#include "norm/rms_norm.h"
#include "ssm/delta/gated_delta_rule.h"
#include "ssm/scan/scan.h"
#include "python/bindings.h"
#include "python/slots_caster.h"
#include "python/view_caster.h"

namespace py = pybind11;

namespace klfast {

void bind_ssm(py::module_& m) {
    m.def("selective_scan", [](View u, View delta, View a, View b, View c, View d, View z, View delta_bias,
                               View initial, View out, View state, Int batch, Int channels, Int length, Int groups,
                               Int states, bool constant_b, bool constant_c, bool softplus, int n_threads, int limit) {
        const py::gil_scoped_release release;
        const SelectiveScanArgs args{
            .u = u,
            .delta = delta,
            .z = z,
            .out = out,
            .a = a,
            .b = b,
            .c = c,
            .d = d,
            .delta_bias = delta_bias,
            .initial = initial,
            .state = state,
            .batch = batch,
            .channels = channels,
            .length = length,
            .groups = groups,
            .states = states,
            .constant_b = constant_b,
            .constant_c = constant_c,
            .softplus = softplus,
            .n_threads = n_threads,
        };
        selective_scan(args, static_cast<Tier>(limit));
    });
    m.def("selective_state_update",
          [](View state, View x, View dt, View a, View b, View c, View d, View z, View dt_bias, View out, Slots slots,
             Int batch, Int heads, Int dim, Int groups, Int states, bool softplus, int n_threads, int limit) {
              const py::gil_scoped_release release;
              const StateUpdateArgs args{
                  .state = state,
                  .x = x,
                  .dt = dt,
                  .z = z,
                  .out = out,
                  .a = a,
                  .b = b,
                  .c = c,
                  .d = d,
                  .dt_bias = dt_bias,
                  .slots = slots,
                  .batch = batch,
                  .heads = heads,
                  .dim = dim,
                  .groups = groups,
                  .states = states,
                  .softplus = softplus,
                  .a_is_log = false,
                  .n_threads = n_threads,
              };
              selective_state_update(args, static_cast<Tier>(limit));
          });
    m.def("mamba_chunk_scan", [](View x, View dt, View a, View b, View c, View d, View z, View dt_bias, View initial,
                                 View final, View out, Int batch, Int length, Int heads, Int dim, Int groups,
                                 Int states, bool softplus, float dt_min, float dt_max, int n_threads, int limit) {
        const py::gil_scoped_release release;
        const ChunkScanArgs args{
            .x = x,
            .z = z,
            .out = out,
            .dt = dt,
            .a = a,
            .dt_bias = dt_bias,
            .b = b,
            .c = c,
            .d = d,
            .initial = initial,
            .final = final,
            .batch = batch,
            .length = length,
            .heads = heads,
            .dim = dim,
            .groups = groups,
            .states = states,
            .softplus = softplus,
            .dt_min = dt_min,
            .dt_max = dt_max,
            .n_threads = n_threads,
        };
        mamba_chunk_scan(args, static_cast<Tier>(limit));
    });
    m.def("gated_delta_rule",
          [](View q, View k, View v, View g, View beta, View state, View out, Int batch, Int length, Int key_heads,
             Int key_dim, Int heads, Int value_dim, float scale, bool normalize, int n_threads, int limit) {
              const py::gil_scoped_release release;
              const GatedDeltaRuleArgs args{
                  .q = q,
                  .k = k,
                  .v = v,
                  .out = out,
                  .g = g,
                  .beta = beta,
                  .state = state,
                  .batch = batch,
                  .length = length,
                  .key_heads = key_heads,
                  .heads = heads,
                  .key_dim = key_dim,
                  .value_dim = value_dim,
                  .normalize = normalize,
                  .scale = scale,
                  .n_threads = n_threads,
              };
              gated_delta_rule(args, static_cast<Tier>(limit));
          });
    m.def("causal_conv1d", [](View x, View weight, View bias, View initial, View final, View out, Slots slots,
                              Address steps_seen, Int batch, Int channels, Int length, Int width, Int initial_length,
                              Int final_length, bool silu, int n_threads, int limit) {
        const py::gil_scoped_release release;
        const ConvArgs args{
            .x = x,
            .out = out,
            .weight = weight,
            .bias = bias,
            .initial = initial,
            .final = final,
            .slots = slots,
            .steps_seen = pointer<const Int>(steps_seen),
            .batch = batch,
            .channels = channels,
            .length = length,
            .width = width,
            .initial_length = initial_length,
            .final_length = final_length,
            .silu = silu,
            .n_threads = n_threads,
        };
        causal_conv1d(args, static_cast<Tier>(limit));
    });
    m.def("rms_norm",
          [](View x, View weight, View gate, View out, Int rows, Int rows_inner, Int channels, Int group_size,
             float eps, bool norm_before_gate, bool sigmoid_gate, float weight_offset, int n_threads, int limit) {
              const py::gil_scoped_release release;
              const RmsNormArgs args{
                  .x = x,
                  .gate = gate,
                  .out = out,
                  .weight = weight,
                  .rows = rows,
                  .rows_inner = rows_inner,
                  .channels = channels,
                  .group_size = group_size,
                  .eps = eps,
                  .weight_offset = weight_offset,
                  .norm_before_gate = norm_before_gate,
                  .sigmoid_gate = sigmoid_gate,
                  .n_threads = n_threads,
              };
              rms_norm(args, static_cast<Tier>(limit));
          });
}

}  // namespace klfast
