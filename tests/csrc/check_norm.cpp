// rms_norm against double.
#include <cmath>

#include "check.h"
#include "norm/rms_norm.h"

namespace klfast::test {

void check_norm() {
    constexpr Int rows = 3, inner = 2;
    constexpr float eps = 1e-5f;
    for (const DType dtype : kTypes)
        for (const Int size : {1, 19, 131})
            for (const Int kind : {0, 1, 2, 3}) {
                const bool last = kind & 1, is_sigmoid = kind & 2;
                const Int groups = last ? 1 : 3;
                const double offset = kind;
                const auto act = [&](double x) { return is_sigmoid ? 1 / (1 + std::exp(-x)) : silu(x); };
                const Int channels = size * groups;
                Tensor x = Tensor::random(dtype, {rows, inner, channels}),
                       gate = Tensor::random(dtype, {rows, inner, channels}),
                       weight = Tensor::random(dtype, {channels});
                std::vector<double> truth(x.size());
                for (Int first = 0; first < x.size(); first += size) {
                    double squares = 0;
                    for (Int i = first; i < first + size; ++i) {
                        truth[i] = last ? x[i] : x[i] * act(gate[i]);
                        squares += truth[i] * truth[i];
                    }
                    const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + eps);
                    for (Int i = first; i < first + size; ++i)
                        truth[i] *= scale * (weight[i % channels] + offset) * (last ? act(gate[i]) : 1);
                }
                for_tiers("rms_norm", [&](Tier tier) {
                    Tensor out(dtype, {rows, inner, channels});
                    const RmsNormArgs args{
                        .x = x.view(),
                        .gate = gate.view(),
                        .out = out.view(),
                        .weight = weight.view(),
                        .rows = rows,
                        .rows_inner = inner,
                        .channels = channels,
                        .group_size = size,
                        .eps = eps,
                        .weight_offset = static_cast<float>(offset),
                        .norm_before_gate = last,
                        .sigmoid_gate = is_sigmoid,
                        .n_threads = kThreads,
                    };
                    call([&] { rms_norm(args, tier); });
                    compare("rms_norm", tier, out, truth);
                });
            }
}

}  // namespace klfast::test
