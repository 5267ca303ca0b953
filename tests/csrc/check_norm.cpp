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
            for (const Int groups : {1, 3}) {
                const Int channels = size * groups;
                Tensor x = Tensor::random(dtype, {rows, inner, channels}),
                       gate = Tensor::random(dtype, {rows, inner, channels}),
                       weight = Tensor::random(dtype, {channels});
                std::vector<double> truth(x.size());
                for (Int first = 0; first < x.size(); first += size) {
                    double squares = 0;
                    for (Int i = first; i < first + size; ++i) {
                        truth[i] = x[i] * silu(gate[i]);
                        squares += truth[i] * truth[i];
                    }
                    const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + eps);
                    for (Int i = first; i < first + size; ++i) truth[i] *= scale * weight[i % channels];
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
                        .n_threads = kThreads,
                    };
                    rms_norm(args, tier);
                    compare("rms_norm", tier, out, truth);
                });
            }
}

}  // namespace klfast::test
