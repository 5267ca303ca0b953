// Tensors come as addresses with shapes and strides in elements, checked by klfast/dispatch/registry.py;
// klfast/backends/cpu/matmul.py passes them.
#include "matmul/quantized/dequant_matmul.h"
#include "matmul/quantized/grouped.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace klfast {
namespace {

DequantMatmulArgs arguments(Address x, int x_type, Int x_stride, Address packed, Address scale, int scale_type,
                            Address zero_point, Address bias, int bias_type, Address y, int y_type, Int rows, Int n,
                            Int k, int bits, Int group, bool int8_activation, int n_threads) {
    return {
        {
            .x = pointer<const void>(x),
            .x_type = static_cast<DType>(x_type),
            .x_stride = x_stride,
            .bias = pointer<const void>(bias),
            .bias_type = static_cast<DType>(bias_type),
            .y = pointer<void>(y),
            .y_type = static_cast<DType>(y_type),
            .rounded_to = static_cast<DType>(y_type),
            .m = rows,
            .n = n,
            .k = k,
            .n_threads = n_threads,
        },
        {
            .packed = pointer<const std::int32_t>(packed),
            .scale = pointer<const void>(scale),
            .scale_type = static_cast<DType>(scale_type),
            .zero_point = pointer<const std::int32_t>(zero_point),
            .bits = bits,
            .group = group,
            .int8_activation = int8_activation,
        },
    };
}

template <class... Of>
void bind(py::module_& m, DequantMatmulArgs (*make)(Of...)) {
    m.def(
        "dequant_matmul", [make](Of... of, int limit) { dequant_matmul(make(of...), static_cast<Tier>(limit)); },
        py::call_guard<py::gil_scoped_release>(), "x [rows, k] to y [rows, n].");
    m.def(
        "difference_matmul",
        [make](Address known_x, Int known_rows, Of... of, int limit) {
            DequantMatmulArgs args = make(of...);
            args.known_x = pointer<const float>(known_x);
            args.bias_rows = known_rows;
            dequant_matmul(args, static_cast<Tier>(limit));
        },
        py::call_guard<py::gil_scoped_release>(),
        "x [rows, k], less known x [known_rows, k] again and again, to y [rows, n], plus the bias [known_rows, n].");
    m.def(
        "grouped_dequant_matmul",
        [make](Address index, Int each, Int count, Of... of, int limit) {
            const GroupedDequantMatmulArgs args{
                .one = make(of...),
                .index = pointer<const std::int64_t>(index),
                .each = each,
                .count = count,
            };
            return grouped_dequant_matmul(args, static_cast<Tier>(limit));
        },
        py::call_guard<py::gil_scoped_release>(),
        "x [rows, k] to y [rows, each, n]; False if an index is out of range.");
}

}  // namespace

void bind_dequant_matmul(py::module_& m) { bind(m, arguments); }

}  // namespace klfast
