// Tensors come as addresses with shapes and strides in elements, checked by klfast/dispatch/registry.py;
// klfast/backends/cpu/products.py passes them.
#include "matmul/dense/linear.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace klfast {

void bind_linear(py::module_& m) {
    m.def(
        "linear",
        [](Address x, int x_type, Int x_stride, Address weight, int weight_type, Int weight_stride, Address bias,
           int bias_type, Address y, int y_type, int rounded_to, Int rows, Int n, Int k, int n_threads, int limit) {
            const LinearArgs args{
                {
                    .x = pointer<const void>(x),
                    .x_type = static_cast<DType>(x_type),
                    .x_stride = x_stride,
                    .bias = pointer<const void>(bias),
                    .bias_type = static_cast<DType>(bias_type),
                    .y = pointer<void>(y),
                    .y_type = static_cast<DType>(y_type),
                    .rounded_to = static_cast<DType>(rounded_to),
                    .m = rows,
                    .n = n,
                    .k = k,
                    .n_threads = n_threads,
                },
                {
                    .weight = pointer<const void>(weight),
                    .weight_type = static_cast<DType>(weight_type),
                    .weight_stride = weight_stride,
                },
            };
            linear(args, static_cast<Tier>(limit));
        },
        py::call_guard<py::gil_scoped_release>(), "x [rows, k] to y [rows, n].");
}

}  // namespace klfast
