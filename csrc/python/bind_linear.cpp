// Tensors come as addresses with shapes and strides in elements, checked by klfast/dispatch/registry.py;
// klfast/backends/cpu/products.py passes them.
#include "python/bind_linear.h"

#include "matmul/dense/linear.h"

namespace py = pybind11;

namespace klfast {

void bind_linear(py::module_& m) {
    using Address = std::uintptr_t;
    m.def(
        "linear",
        [](Address x, int x_type, std::int64_t x_stride, Address weight, int weight_type, std::int64_t weight_stride,
           Address bias, int bias_type, Address y, int y_type, int rounded_to, std::int64_t rows, std::int64_t n,
           std::int64_t k, int n_threads, int tier_limit) {
            linear({{reinterpret_cast<const void*>(x), static_cast<DType>(x_type), x_stride,
                     reinterpret_cast<const void*>(bias), static_cast<DType>(bias_type), reinterpret_cast<void*>(y),
                     static_cast<DType>(y_type), static_cast<DType>(rounded_to), rows, n, k, n_threads},
                    reinterpret_cast<const void*>(weight),
                    static_cast<DType>(weight_type),
                    weight_stride},
                   static_cast<Tier>(tier_limit));
        },
        py::call_guard<py::gil_scoped_release>(),
        "x [rows, k] to y [rows, n]; an address of 0 stands for an absent tensor.");
}

}  // namespace klfast
