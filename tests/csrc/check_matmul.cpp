// dequant_matmul, alone and grouped, and linear against products in double.
#include <numeric>

#include "check.h"
#include "matmul/dense/linear.h"
#include "matmul/quantized/dequant_matmul.h"
#include "matmul/quantized/grouped.h"

namespace klfast::test {
namespace {

// W [n, k] as integers of 4, 6 or 8 bits in groups that share a scale and, if present, a zero point.
struct Weight {
    Int n, k, group, groups;
    int bits;
    std::vector<std::int32_t> packed, zero_point;
    Tensor scale;
    std::vector<double> value;  // [n, k]

    Weight(Int rows, Int columns, int width, Int group_size, bool symmetric)
        : n(rows),
          k(columns),
          group(group_size),
          groups((k + group - 1) / group),
          bits(width),
          packed(n * words(k)),
          zero_point(symmetric ? 0 : words(n) * groups),
          scale(Tensor::random(DType::f32, {n, groups}, 0.1)),
          value(n * k) {
        for (Int r = 0; r < n; ++r)
            for (Int c = 0; c < k; ++c) {
                const Int q = random_int(0, Int{1} << bits);
                put(packed.data() + r * words(k), 1, c, q);
                value[r * k + c] = static_cast<double>(q);
            }
        for (Int r = 0; r < n; ++r)
            for (Int g = 0; g < groups; ++g) {
                const Int z = symmetric ? Int{1} << (bits - 1) : random_int(0, Int{1} << bits);
                if (!symmetric) put(zero_point.data() + g, groups, r, z);
                for (Int c = g * group; c < k && c < (g + 1) * group; ++c)
                    value[r * k + c] = (value[r * k + c] - static_cast<double>(z)) * scale[r * groups + g];
            }
    }

    Int words(Int values) const { return (values * bits + 31) / 32; }

  private:
    // Value i of those whose words lie `pitch` apart; it may cross from one word into the next.
    void put(std::int32_t* to, Int pitch, Int i, Int q) const {
        const Int bit = i * bits;
        const std::uint64_t moved = static_cast<std::uint64_t>(q) << bit % 32;
        std::int32_t& word = to[bit / 32 * pitch];
        word = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) | static_cast<std::uint32_t>(moved));
        if (bit % 32 + bits > 32) to[(bit / 32 + 1) * pitch] |= static_cast<std::int32_t>(moved >> 32);
    }
};

// x W^T + bias, both by [rows, k]; the bias has any number of rows, which repeat.
std::vector<double> product(const Tensor& x, Int m, Int k, const std::vector<double>& w, Int n, const Tensor& bias,
                            Int bias_rows = 1) {
    std::vector<double> y(m * n), row(k);
    for (Int i = 0; i < m; ++i) {
        for (Int c = 0; c < k; ++c) row[c] = x[i * k + c];
        for (Int j = 0; j < n; ++j) {
            const double* const weight = w.data() + j * k;
            y[i * n + j] = std::inner_product(row.begin(), row.end(), weight, bias[i % bias_rows * n + j]);
        }
    }
    return y;
}

// The rows of a product of x with a stack of `count` matrices that meet matrix index[i].
std::vector<double> chosen(const std::vector<double>& all, Int count, Int n, const std::vector<Int>& index, Int each) {
    std::vector<double> y(index.size() * n);
    for (Int i = 0; i < static_cast<Int>(index.size()); ++i)
        for (Int j = 0; j < n; ++j) y[i * n + j] = all[(i / each * count + index[i]) * n + j];
    return y;
}

Product product_args(Tensor& x, Tensor& bias, Tensor& y, Int m, Int n, Int k) {
    return {
        .x = x.data(),
        .x_type = x.dtype(),
        .x_stride = k,
        .bias = bias.data(),
        .bias_type = bias.dtype(),
        .y = y.data(),
        .y_type = y.dtype(),
        .rounded_to = y.dtype(),
        .m = m,
        .n = n,
        .k = k,
        .n_threads = kThreads,
    };
}

// Multiples of 1 / 64 up to 127 / 64, which occurs in each row and group, so that activation "int8" does not round.
Tensor whole_steps(DType dtype, Int m, Int k, Int group) {
    Tensor x(dtype, {m, k});
    for (Int i = 0; i < m * k; ++i)
        x.set(i, static_cast<double>(i % k % group == 0 ? 127 : random_int(-127, 128)) / 64);
    return x;
}

QuantizedWeight weight_args(Weight& w, bool int8_activation) {
    return {
        .packed = w.packed.data(),
        .scale = w.scale.data(),
        .scale_type = w.scale.dtype(),
        .zero_point = w.zero_point.empty() ? nullptr : w.zero_point.data(),
        .bits = w.bits,
        .group = w.group,
        .int8_activation = int8_activation,
    };
}

void check_quantized(DType dtype, Weight& w, Int m, bool int8_activation) {
    Tensor x = int8_activation ? whole_steps(dtype, m, w.k, w.group) : Tensor::random(dtype, {m, w.k});
    for (const Int bias_rows : {1, 3}) {
        Tensor bias = Tensor::random(DType::f32, {bias_rows, w.n});
        const std::vector<double> truth = product(x, m, w.k, w.value, w.n, bias, bias_rows);
        for_tiers("dequant_matmul", [&](Tier tier) {
            Tensor y(dtype, {m, w.n});
            DequantMatmulArgs args{product_args(x, bias, y, m, w.n, w.k), weight_args(w, int8_activation)};
            args.bias_rows = bias_rows;
            call([&] { dequant_matmul(args, tier); });
            compare("dequant_matmul", tier, y, truth);
        });
    }
}

// Rows that differ from two known ones by what does not round.
void check_difference(Weight& w, Int m) {
    constexpr Int known_rows = 2;
    const Tensor difference = whole_steps(DType::f32, m, w.k, w.group);
    Tensor known(DType::f32, {known_rows, w.k}), x(DType::f32, {m, w.k});
    for (Int i = 0; i < known_rows * w.k; ++i) known.set(i, static_cast<double>(random_int(-999, 1000)) / 64);
    for (Int i = 0; i < m * w.k; ++i) x.set(i, known[i / w.k % known_rows * w.k + i % w.k] + difference[i]);
    Tensor bias = Tensor::random(DType::f32, {known_rows, w.n});
    const std::vector<double> truth = product(difference, m, w.k, w.value, w.n, bias, known_rows);
    for_tiers("dequant_matmul", [&](Tier tier) {
        Tensor y(DType::f32, {m, w.n});
        DequantMatmulArgs args{product_args(x, bias, y, m, w.n, w.k), weight_args(w, true)};
        args.bias_rows = known_rows, args.known_x = static_cast<const float*>(known.data());
        call([&] { dequant_matmul(args, tier); });
        compare("dequant_matmul", tier, y, truth);
    });
}

// Each row of x meets `each` of the `count` matrices that w's rows are.
void check_grouped(DType dtype, Weight& w, Int count, Int m, Int each) {
    const Int n = w.n / count;
    Tensor x = Tensor::random(dtype, {m, w.k}), none(DType::f32, {w.n});
    std::vector<Int> index(m * each);
    for (Int& i : index) i = random_int(0, count);
    for (Int i = 0; i < w.n; ++i) none.set(i, 0.0);
    const std::vector<double> truth = chosen(product(x, m, w.k, w.value, w.n, none), count, n, index, each);
    for_tiers("grouped_dequant_matmul", [&](Tier tier) {
        Tensor y(dtype, {m, each, n});
        GroupedDequantMatmulArgs args{
            .one = {product_args(x, none, y, m, n, w.k), weight_args(w, false)},
            .index = index.data(),
            .each = each,
            .count = count,
        };
        args.one.bias = nullptr;
        grouped_dequant_matmul(args, tier);
        compare("grouped_dequant_matmul", tier, y, truth);
    });
}

}  // namespace

void check_quantized_matmul() {
    for (const int bits : {4, 6, 8})
        for (const Int group : {Int{20}, Int{32}, Int{128}, Int{601}})
            for (const bool symmetric : {true, false}) {
                Weight w(37, 601, bits, group, symmetric);
                for (const DType dtype : kTypes)
                    for (const Int m : {1, 3, 7, 19, 35})
                        for (const bool int8_activation : {false, true}) check_quantized(dtype, w, m, int8_activation);
                for (const Int m : {2, 19, 34}) check_difference(w, m);
                Weight stack(3 * 37, 601, bits, group, symmetric);
                for (const DType dtype : kTypes)
                    for (const Int m : {1, 7, 35})
                        for (const Int each : {1, 2}) check_grouped(dtype, stack, 3, m, each);
            }
}

void check_dense_matmul() {
    constexpr Int n = 37, k = 301;
    for (const DType dtype : kTypes) {
        Tensor weight = Tensor::random(dtype, {n, k}), bias = Tensor::random(DType::f32, {n});
        std::vector<double> w(n * k);
        for (Int i = 0; i < n * k; ++i) w[i] = weight[i];
        for (const Int m : {1, 3, 8, 9, 35}) {
            Tensor x = Tensor::random(dtype, {m, k});
            const std::vector<double> truth = product(x, m, k, w, n, bias);
            for_tiers("linear", [&](Tier tier) {
                Tensor y(dtype, {m, n});
                const LinearArgs args{
                    product_args(x, bias, y, m, n, k),
                    {.weight = weight.data(), .weight_type = dtype, .weight_stride = k},
                };
                call([&] { linear(args, tier); });
                compare("linear", tier, y, truth);
            });
        }
    }
}

}  // namespace klfast::test
