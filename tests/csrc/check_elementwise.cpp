// combine and weighted_sum against double, with each step rounded as they promise; largest against a loop.
#include <cmath>
#include <limits>

#include "check.h"
#include "elementwise/combine.h"
#include "elementwise/largest.h"
#include "elementwise/weighted_sum.h"

namespace klfast::test {
namespace {

double rounded(double v, DType dtype) {
    Tensor one(dtype, {1});
    one.set(0, v);
    return one[0];
}

double combined(Combination how, double factor, double a, double b, DType dtype) {
    const auto step = [&](double v) { return rounded(v, dtype); };
    switch (how) {
        case Combination::add: return a + step(factor * b);
        case Combination::average: return step(a + b) / 2;
        case Combination::multiply: return a * b;
        case Combination::silu_gate: return step(silu(a)) * b;
        case Combination::sigmoid_gate: return step(1 / (1 + std::exp(-a))) * b;
        case Combination::gelu_gate: return step(0.5 * a * std::erfc(-a / std::sqrt(2))) * b;
        case Combination::gelu_tanh_gate:
            return step(0.5 * a * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (a + 0.044715 * a * a * a)))) * b;
        case Combination::relu_gate: return std::fmax(a, 0) * b;
        case Combination::softplus_gate: return step(std::log1p(std::exp(a))) * b;
    }
    return 0;
}

void check_weighted_sum(DType dtype, DType of_weights, Int each, Int width) {
    constexpr Int rows = 3, sources = 5;
    Tensor x = Tensor::random(dtype, {sources, width}), weights = Tensor::random(of_weights, {rows, each});
    std::vector<Int> place(rows * each);
    for (Int& i : place) i = random_int(0, sources);
    std::vector<double> truth(rows * width);
    for (Int row = 0; row < rows; ++row)
        for (Int s = 0; s < each; ++s)
            for (Int i = 0; i < width; ++i)
                truth[row * width + i] +=
                    rounded(weights[row * each + s] * x[place[row * each + s] * width + i], of_weights);
    for_tiers("weighted_sum", [&](Tier tier) {
        Tensor out(dtype, {rows, width});
        const WeightedSumArgs args{
            .x = x.view(),
            .weights = weights.view(),
            .out = out.view(),
            .place = place.data(),
            .rows = rows,
            .each = each,
            .width = width,
            .n_threads = kThreads,
        };
        call([&] { weighted_sum(args, tier); });
        compare("weighted_sum", tier, out, truth);
    });
}

void check_combine() {
    constexpr Int rows = 3;
    constexpr float factor = 0.75f;
    for (const DType dtype : kTypes)
        for (const Int width : {1, 19, 1031})
            for (const Combination how :
                 {Combination::add, Combination::average, Combination::multiply, Combination::silu_gate,
                  Combination::sigmoid_gate, Combination::gelu_gate, Combination::gelu_tanh_gate,
                  Combination::relu_gate, Combination::softplus_gate}) {
                Tensor a = Tensor::random(dtype, {rows, width}, 3.0), b = Tensor::random(dtype, {rows, width}, 3.0);
                a.set(0, std::numeric_limits<double>::infinity());
                std::vector<double> truth(rows * width);
                for (Int i = 0; i < rows * width; ++i) truth[i] = combined(how, factor, a[i], b[i], dtype);
                for_tiers("combine", [&](Tier tier) {
                    Tensor out(dtype, {rows, width}), narrow(DType::bf16, {rows, width});
                    const CombineArgs args{
                        .a = a.view(),
                        .b = b.view(),
                        .out = out.view(),
                        .narrow = narrow.view(),
                        .rows = rows,
                        .width = width,
                        .how = how,
                        .factor = factor,
                        .n_threads = kThreads,
                    };
                    call([&] { combine(args, tier); });
                    compare("combine", tier, out, truth);
                    compare("combine", tier, narrow, truth);
                });
            }
}

void check_largest() {
    constexpr Int rows = 3;
    for (const Int width : {1, 19, 1031, 5000}) {
        Tensor x = Tensor::random(DType::f32, {rows, width});
        std::vector<double> truth(2 * rows);
        for (Int row = 0; row < rows; ++row) {
            Int best = 0;
            for (Int i = 1; i < width; ++i)
                if (x[row * width + i] > x[row * width + best]) best = i;
            truth[2 * row] = x[row * width + best], truth[2 * row + 1] = static_cast<double>(best);
        }
        for_tiers("largest", [&](Tier tier) {
            float value[rows];
            std::int64_t index[rows];
            largest({.x = static_cast<const float*>(x.view().data),
                     .rows = rows,
                     .width = width,
                     .stride = width,
                     .value = value,
                     .index = index,
                     .n_threads = kThreads},
                    tier);
            Tensor out(DType::f32, {rows, 2});
            for (Int row = 0; row < rows; ++row)
                out.set(2 * row, value[row]), out.set(2 * row + 1, static_cast<double>(index[row]));
            compare("largest", tier, out, truth);
        });
    }
}

}  // namespace

void check_elementwise() {
    check_combine();
    check_largest();
    for (const DType dtype : kTypes)
        for (const DType of_weights : {dtype, DType::f32})
            for (const Int each : {1, 3})
                for (const Int width : {1, 19, 1031}) check_weighted_sum(dtype, of_weights, each, width);
}

}  // namespace klfast::test
