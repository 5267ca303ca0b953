// Layers made once and called often; klfast/nn/direct_call.py has checked their tensors and holds their memory during
// each call.
#include "prepared/mamba_step.h"
#include "python/bindings.h"
#include "python/multiply.h"
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

// What a product with a layer's weight has before its rows are known.
Product product(const View& bias, Int n, Int k) {
    Product product{};
    product.bias = bias.data, product.bias_type = bias.dtype, product.n = n, product.k = k;
    return product;
}

PyMethodDef kHold[] = {
    {"hold", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(hold_tensors)), METH_FASTCALL,
     "hold(seen, gradients): the storages of tensors; None if one has changed or takes gradients."},
    {}};

}  // namespace

void bind_prepared(py::module_& m) {
    if (PyModule_AddFunctions(m.ptr(), kHold) < 0) throw py::error_already_set();
    py::class_<Projection>(m, "Projection")
        .def_static("dense",
                    [](View weight, View bias, Int n, Int k) {
                        return Projection(LinearArgs{
                            product(bias, n, k),
                            {.weight = weight.data, .weight_type = weight.dtype, .weight_stride = weight.stride[0]},
                        });
                    })
        .def_static("quantized",
                    [](Address packed, View scale, Address zero_point, View bias, Int n, Int k, int bits, Int group,
                       bool int8_activation) {
                        return Projection(DequantMatmulArgs{
                            product(bias, n, k),
                            {
                                .packed = pointer<const std::int32_t>(packed),
                                .scale = scale.data,
                                .scale_type = scale.dtype,
                                .zero_point = pointer<const std::int32_t>(zero_point),
                                .bits = bits,
                                .group = group,
                                .int8_activation = int8_activation,
                            },
                        });
                    })
        .def("weight_only", &Projection::weight_only)
        .def("__call__", [](const Projection& layer, py::handle x, int type, int n_threads, int limit) {
            return multiply(layer, x, static_cast<DType>(type), n_threads, static_cast<Tier>(limit));
        });
    py::class_<MambaMixer>(m, "MambaMixer")
        .def(py::init([](View conv_weight, View conv_bias, const Projection& x_proj, const Projection& dt_proj,
                         bool normed, View dt_norm, View b_norm, View c_norm, float eps, View a_log, View d,
                         View dt_bias, Int channels, Int width, Int rank, Int states) {
            return MambaMixer{
                .conv_weight = conv_weight,
                .conv_bias = conv_bias,
                .x_proj = x_proj,
                .dt_proj = dt_proj.weight_only(),
                .normed = normed,
                .dt_norm = dt_norm,
                .b_norm = b_norm,
                .c_norm = c_norm,
                .eps = eps,
                .a_log = a_log,
                .d = d,
                .dt_bias = dt_bias,
                .channels = channels,
                .width = width,
                .rank = rank,
                .states = states,
            };
        }))
        .def("__call__", [](const MambaMixer& mixer, View x, View z, View conv_state, View ssm_state, View out,
                            Int batch, Int conv_length, int n_threads, int limit) {
            const py::gil_scoped_release release;
            const MambaStepArgs args{
                .x = x,
                .z = z,
                .out = out,
                .conv_state = conv_state,
                .ssm_state = ssm_state,
                .batch = batch,
                .conv_length = conv_length,
                .n_threads = n_threads,
            };
            mamba_step(mixer, args, static_cast<Tier>(limit));
        });
}

}  // namespace klfast
