// klfast/backends/cpu/largest.py has checked the tensors and allocated the results.
#include "elementwise/largest.h"
#include "python/bindings.h"

namespace klfast {

void bind_elementwise(pybind11::module_& m) {
    m.def("largest",
          [](Address x, Int rows, Int width, Int stride, Address value, Address index, int n_threads, int limit) {
              const pybind11::gil_scoped_release release;
              const LargestArgs args{
                  .x = pointer<const float>(x),
                  .rows = rows,
                  .width = width,
                  .stride = stride,
                  .value = pointer<float>(value),
                  .index = pointer<Int>(index),
                  .n_threads = n_threads,
              };
              largest(args, static_cast<Tier>(limit));
          });
}

}  // namespace klfast
