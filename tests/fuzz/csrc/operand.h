// Tensors for calls of ops. They lie in memory of their own that ends with their last element, so that
// AddressSanitizer sees whatever reaches beyond.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/tensor_view.h"
#include "input.h"

namespace klfast::fuzz {

using Shape = std::vector<Int>;

enum class Strides {
    dense,  // contiguous
    rows,   // the last is 1
    any,    // in any order, with gaps
};

class Operand {
  public:
    // What an op reads: a dimension may repeat the same elements, unless the strides are dense.
    static Operand read(Input& input, const Shape& shape, DType dtype, Strides strides = Strides::any) {
        return Operand(input, shape, dtype, strides, true);
    }
    static Operand read(Input& input, const Shape& shape, Strides strides = Strides::any) {
        return read(input, shape, draw_dtype(input), strides);
    }

    // What it writes, perhaps after reading: each element has its own memory.
    static Operand written(Input& input, const Shape& shape, DType dtype, Strides strides = Strides::any) {
        return Operand(input, shape, dtype, strides, false);
    }
    static Operand written(Input& input, const Shape& shape, Strides strides = Strides::any) {
        return written(input, shape, draw_dtype(input), strides);
    }

    static DType draw_dtype(Input& input) { return input.one_of({DType::f32, DType::bf16, DType::f16}); }

    View view() const { return view_; }
    void* data() const { return view_.data; }
    DType dtype() const { return view_.dtype; }

    // The tensor, or none.
    View maybe(Input& input) const { return input.flag() ? view_ : View{}; }

  private:
    Operand(Input& input, const Shape& shape, DType dtype, Strides strides, bool may_repeat);

    Int draw_strides(Input& input, const Shape& shape, Strides strides, bool may_repeat);

    View view_;  // without elements: no address, as torch has it
    std::unique_ptr<std::byte[]> memory_;
};

// Fills memory with numbers of a kind and size that the input decides: NaNs, infinities and denormals may be among
// them.
void fill(Input& input, void* data, Int count, DType dtype);

}  // namespace klfast::fuzz
