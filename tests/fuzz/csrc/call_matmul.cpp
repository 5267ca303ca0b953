#include <algorithm>
#include <vector>

#include "calls.h"
#include "matmul/dense/linear.h"
#include "matmul/quantized/dequant_matmul.h"
#include "matmul/quantized/grouped.h"
#include "matmul/quantized/rows.h"
#include "operand.h"

namespace klfast::fuzz {
namespace {

std::vector<std::int32_t> words(Random& random, Int count) {
    std::vector<std::int32_t> made(count);
    for (std::int32_t& word : made) word = static_cast<std::int32_t>(random.bits());
    return made;
}

// A quantized weight [n, k]: any bits are one.
class Weight {
  public:
    Weight(Input& input, Int n, Int k)
        : bits_(input.one_of({4, 6, 8})),
          group_(std::clamp<Int>(input.flag() ? input.one_of({16, 32, 64, 128, 256}) : 1 + input.index(600), 1,
                                 std::max<Int>(k, 1))),
          groups_((k + group_ - 1) / group_),
          zero_row_(input.index(9)),
          int8_activation_(input.flag()),
          scale_(Operand::read(input, {n, groups_}, Strides::dense)) {
        Random random(input.byte());
        packed_ = words(random, n * ((k * bits_ + 31) / 32));
        if (input.flag()) zero_point_ = words(random, ((zero_row_ + n) * bits_ + 31) / 32 * groups_);
    }

    QuantizedWeight args() const {
        return {
            .packed = packed_.data(),
            .scale = scale_.data(),
            .scale_type = scale_.dtype(),
            .zero_point = zero_point_.data(),
            .zero_row = zero_row_,
            .bits = bits_,
            .group = group_,
            .int8_activation = int8_activation_,
        };
    }

  private:
    int bits_;
    Int group_, groups_, zero_row_;
    bool int8_activation_;
    Operand scale_;
    std::vector<std::int32_t> packed_, zero_point_;
};

// x [m, k], bias [bias_rows, n] and y [each m, n].
class Rows {
  public:
    Rows(Input& input, Int m, Int n, Int k, Int each = 1, Int bias_rows = 1)
        : x_(Operand::read(input, {m, k}, Strides::rows)),
          bias_(Operand::read(input, {bias_rows, n}, Strides::dense)),
          rounded_to_(Operand::draw_dtype(input)),
          y_(Operand::written(input, {m, each, n}, input.flag() ? DType::f32 : rounded_to_, Strides::dense)),
          product_{
              .x = x_.data(),
              .x_type = x_.dtype(),
              .x_stride = x_.view().stride[0],
              .bias = bias_.maybe(input).data,
              .bias_type = bias_.dtype(),
              .bias_rows = bias_rows,
              .y = y_.data(),
              .y_type = y_.dtype(),
              .rounded_to = rounded_to_,
              .m = m,
              .n = n,
              .k = k,
              .n_threads = 1,
          } {}

    Product args(How how) const {
        Product product = product_;
        product.n_threads = how.n_threads;
        return product;
    }

  private:
    Operand x_, bias_;
    DType rounded_to_;
    Operand y_;
    Product product_;
};

}  // namespace

void call_dequant_matmul(Input& input, How how) {
    const Int k = input.size(600), n = input.size(80), m = input.size(40);
    const Weight weight(input, n, k);
    const Int bias_rows = 1 + input.index(3);
    const Rows rows(input, m, n, k, 1, bias_rows);
    const Operand known = Operand::read(input, {bias_rows, k}, DType::f32, Strides::dense);
    DequantMatmulArgs args{rows.args(how), weight.args()};
    if (args.int8_activation && input.flag()) args.known_x = static_cast<const float*>(known.data());
    dequant_matmul(args, how.limit);
}

void call_grouped_dequant_matmul(Input& input, How how) {
    const Int k = input.size(300), n = input.size(40), count = input.size(5, 1), m = input.size(20),
              each = input.size(4);
    const Weight weight(input, count * n, k);
    const Rows rows(input, m, n, k, each);
    std::vector<Int> index(m * each);
    Random random(input.byte());
    for (Int& matrix : index) matrix = random.bits() % count;
    const bool is_known = index.empty() || input.byte() % 16 != 0;
    if (!is_known) index.back() = input.one_of<Int>({count, -1, INT64_MAX, INT64_MIN});
    GroupedDequantMatmulArgs args{
        .one = {rows.args(how), weight.args()},
        .index = index.data(),
        .each = each,
        .count = count,
    };
    args.one.bias = nullptr, args.one.zero_row = 0;
    require(grouped_dequant_matmul(args, how.limit) == is_known, "an index out of range is refused");
}

void call_linear(Input& input, How how) {
    const Int k = input.size(600), n = input.size(80), m = input.size(40);
    const Rows rows(input, m, n, k);
    const Product product = rows.args(how);
    const Operand weight = Operand::read(input, {n, k}, product.x_type, Strides::rows);
    linear(
        {
            product,
            {.weight = weight.data(), .weight_type = weight.dtype(), .weight_stride = weight.view().stride[0]},
        },
        how.limit);
}

void call_dequantize_row(Input& input, How) {
    const Int k = input.size(600), n = input.size(80, 1);
    const Weight weight(input, n, k);
    DequantMatmulArgs args{Product{}, weight.args()};
    args.n = n, args.k = k;
    std::vector<float> out(k);
    dequantize_row(args, input.index(n), out.data());
}

}  // namespace klfast::fuzz
