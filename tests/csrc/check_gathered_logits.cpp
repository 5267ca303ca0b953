// gathered_logits against sums in double.
#include "check.h"
#include "divergence/gathered/gathered_logits.h"

namespace klfast::test {

void check_gathered_logits() {
    constexpr Int vocab = 41, tokens = 3, entries = 8;
    for (const DType dtype : kTypes)
        for (const Int features : {1, 37, 64})
            for (const Int students : {1, 4, 6}) {
                Tensor hidden = Tensor::random(dtype, {students, tokens, features}),
                       head = Tensor::random(dtype, {vocab, features});
                std::vector<Int> index(tokens * entries);
                for (Int& row : index) row = random_int(0, vocab);
                std::vector<double> truth(students * tokens * entries);
                for (Int i = 0; i < students * tokens * entries; ++i)
                    for (Int k = 0; k < features; ++k)
                        truth[i] +=
                            hidden[i / entries * features + k] * head[index[i % (tokens * entries)] * features + k];
                for_tiers("gathered_logits", [&](Tier tier) {
                    Tensor out(DType::f32, {students, tokens, entries});
                    const GatheredLogitsArgs args{
                        .hidden = hidden.view(),
                        .head = head.view(),
                        .index = index.data(),
                        .out = static_cast<float*>(out.data()),
                        .students = students,
                        .tokens = tokens,
                        .entries = entries,
                        .features = features,
                        .n_threads = kThreads,
                    };
                    gathered_logits(args, tier);
                    compare("gathered_logits", tier, out, truth);
                });
            }
}

}  // namespace klfast::test
