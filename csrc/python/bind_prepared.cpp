// Layers made once and called often; klfast/nn/direct_call.py has checked their tensors and holds their memory during
// each call.
#include "python/bind_prepared.h"

#include <cstdint>

#include "prepared/mamba_step.h"
#include "python/watch.h"
#include "python/view_caster.h"

namespace py = pybind11;

namespace klfast {
namespace {

// Not by pybind11, whose conversions take as long as the work itself.
PyObject* hold_tensors(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 2 || !PyTuple_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "hold(seen, gradients)");
        return nullptr;
    }
    return hold(args[0], args[1] == Py_True);
}

PyMethodDef kHold[] = {
    {"hold", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hold_tensors)), METH_FASTCALL,
     "hold(seen, gradients): the storages of tensors; None if one has changed or takes gradients."},
    {}};

}  // namespace

void bind_step(py::module_& m) {
    using Int = std::int64_t;
    using Address = std::uintptr_t;
    if (PyModule_AddFunctions(m.ptr(), kHold) < 0) throw py::error_already_set();
    py::class_<Projection>(m, "Projection")
        .def_static("dense",
                    [](View weight, View bias, Int n, Int k) {
                        LinearArgs layer{};
                        layer.weight = weight.data, layer.weight_type = weight.dtype,
                        layer.weight_stride = weight.stride[0];
                        layer.bias = bias.data, layer.bias_type = bias.dtype, layer.n = n, layer.k = k;
                        return Projection(layer);
                    })
        .def_static("quantized",
                    [](Address packed, View scale, Address zero_point, View bias, Int n, Int k, int bits, Int group,
                       bool int8_activation) {
                        DequantMatmulArgs layer{};
                        layer.packed = reinterpret_cast<const std::int32_t*>(packed),
                        layer.zero_point = reinterpret_cast<const std::int32_t*>(zero_point);
                        layer.scale = scale.data, layer.scale_type = scale.dtype, layer.bias = bias.data,
                        layer.bias_type = bias.dtype;
                        layer.n = n, layer.k = k, layer.bits = bits, layer.group = group,
                        layer.int8_activation = int8_activation;
                        return Projection(layer);
                    })
        .def(
            "__call__",
            [](const Projection& layer, Address x, int type, Int x_stride, Address y, Int rows, int n_threads,
               int limit) {
                const py::gil_scoped_release release;
                layer(reinterpret_cast<const void*>(x), static_cast<DType>(type), x_stride, reinterpret_cast<void*>(y),
                      rows, n_threads, static_cast<Tier>(limit));
            },
            "x [rows, k] to y [rows, n], contiguous.");
    py::class_<MambaMixer>(m, "MambaMixer")
        .def(py::init([](View conv_weight, View conv_bias, const Projection& x_proj, const Projection& dt_proj,
                         bool normed, View dt_norm, View b_norm, View c_norm, float eps, View a_log, View d,
                         View dt_bias, Int channels, Int width, Int rank, Int states) {
            return MambaMixer{conv_weight, conv_bias, x_proj, dt_proj.weight_only(),
                              normed,      dt_norm,   b_norm, c_norm,
                              eps,         a_log,     d,      dt_bias,
                              channels,    width,     rank,   states};
        }))
        .def("__call__", [](const MambaMixer& mixer, View x, View z, View conv_state, View ssm_state, View out,
                            Int batch, Int conv_length, int n_threads, int limit) {
            const py::gil_scoped_release release;
            mamba_step(mixer, {x, z, out, conv_state, ssm_state, batch, conv_length, n_threads},
                       static_cast<Tier>(limit));
        });
}

}  // namespace klfast
