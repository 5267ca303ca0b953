#include <cmath>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "engine/instructions.h"

namespace klfast::engine {
namespace {

using Floats = std::vector<float>;

void sigmoids(Floats& x) {
    for (float& v : x) v = 1.0f / (1.0f + std::exp(-v));
}

void softmax(Floats& x) {
    float most = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (const float v : x) most = std::fmax(most, v);
    for (float& v : x) total += v = std::exp(v - most);
    for (float& v : x) v /= total;
}

// The greatest, NaN being the greatest of all, as for torch.topk; the first of equal ones.
std::size_t greatest(const Floats& x, const std::vector<bool>& taken) {
    std::size_t best = x.size();
    for (std::size_t i = 0; i < x.size(); ++i) {
        if (taken[i]) continue;
        if (best == x.size() || x[i] > x[best] || (std::isnan(x[i]) && !std::isnan(x[best]))) best = i;
    }
    return best;
}

// Makes the choices of all groups but the best least.
void close_groups(const Routing& how, Floats& choice) {
    constexpr float least = -std::numeric_limits<float>::infinity();
    const std::size_t size = choice.size() / how.groups;
    Floats best(how.groups);
    for (std::size_t group = 0; group < best.size(); ++group) {
        float first = least, second = least;
        for (std::size_t i = group * size; i < (group + 1) * size; ++i) {
            second = std::fmax(second, std::fmin(first, choice[i]));
            first = std::fmax(first, choice[i]);
        }
        best[group] = first + second;
    }
    std::vector<bool> open(best.size());
    for (std::int64_t s = 0; s < how.open_groups; ++s) open[greatest(best, open)] = true;
    for (std::size_t i = 0; i < choice.size(); ++i)
        if (!open[i / size]) choice[i] = least;
}

void weigh(const Routing& how, Floats& chosen) {
    const auto step = [&](float v) { return rounded(v, how.rounded_to); };
    if (how.normalise) {
        float total = 0.0f;
        for (const float v : chosen) total += v;
        total = step(step(total) + how.epsilon);
        for (float& v : chosen) v = step(v / total);
    }
    for (float& v : chosen) v = step(v * how.factor);
}

}  // namespace

Work route(Routing how, Columns logits, Columns index, Columns weights) {
    return [=](const Input& input, const Buffers& buffers) {
        const View from = buffers[logits], experts = buffers[index], out = buffers[weights];
        const std::int64_t count = logits.width, each = index.width;
        const int threads = worthwhile_threads(input.n_threads, (20.0 + 2.0 * each) * input.rows() * count);
        parallel_for(input.rows(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
            Floats scores(count), choice(count), chosen(each);
            for (std::int64_t row = begin; row < end; ++row) {
                for (std::int64_t i = 0; i < count; ++i)
                    scores[i] = load_float(from.data, row * from.stride[0] + i, from.dtype);
                how.sigmoid ? sigmoids(scores) : softmax(scores);
                for (std::int64_t i = 0; i < count; ++i) {
                    scores[i] = rounded(scores[i], how.rounded_to);
                    choice[i] = scores[i] + (how.bias ? load_float(how.bias.data, i, how.bias.dtype) : 0.0f);
                }
                if (how.open_groups < how.groups) close_groups(how, choice);
                std::vector<bool> taken(count);
                for (std::int64_t s = 0; s < each; ++s) {
                    const std::size_t expert = greatest(choice, taken);
                    taken[expert] = true, chosen[s] = scores[expert];
                    store_float(experts.data, row * experts.stride[0] + s, experts.dtype, static_cast<float>(expert));
                }
                weigh(how, chosen);
                for (std::int64_t s = 0; s < each; ++s)
                    store_float(out.data, row * out.stride[0] + s, out.dtype, chosen[s]);
            }
        });
    };
}

}  // namespace klfast::engine
