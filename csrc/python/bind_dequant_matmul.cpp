// Tensors come as addresses with shapes and strides in elements, checked by klfast/dispatch/registry.py;
// klfast/backends/cpu/products.py passes them.
#include "python/bind_dequant_matmul.h"

#include "matmul/quantized/dequant_matmul.h"

namespace py = pybind11;

namespace klfast {

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_dequant_matmul(py::module_& m) {
    m.def(
        "dequant_matmul",
        [](Address x, int x_type, std::int64_t x_stride, Address packed, Address scale, int scale_type,
           Address zero_point, Address bias, int bias_type, Address y, int y_type, std::int64_t rows, std::int64_t n,
           std::int64_t k, int bits, std::int64_t group, bool int8_activation, int n_threads, int tier_limit) {
            const auto y_as = static_cast<DType>(y_type);
            dequant_matmul({{pointer<const void>(x), static_cast<DType>(x_type), x_stride, pointer<const void>(bias),
                             static_cast<DType>(bias_type), pointer<void>(y), y_as, y_as, rows, n, k, n_threads},
                            pointer<const std::int32_t>(packed),
                            pointer<const void>(scale),
                            static_cast<DType>(scale_type),
                            pointer<const std::int32_t>(zero_point),
                            bits,
                            group,
                            int8_activation},
                           static_cast<Tier>(tier_limit));
        },
        py::call_guard<py::gil_scoped_release>(),
        "x [rows, k] to y [rows, n]; an address of 0 stands for an absent tensor.");
}

}  // namespace klfast
