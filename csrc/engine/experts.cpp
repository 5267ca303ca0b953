#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "elementwise/weighted_sum.h"
#include "engine/instructions.h"
#include "matmul/groups.h"

namespace klfast::engine {
namespace {

// The routes of the run's tokens, by expert. Each member of a team makes its own.
Groups by_expert(const Input& input, const Buffers& buffers, const Routes& routes) {
    const View index = buffers[routes.index];
    const std::int64_t each = routes.index.width;
    std::vector<std::int64_t> experts(input.rows() * each);
    for (std::int64_t row = 0; row < input.rows(); ++row)
        for (std::int64_t s = 0; s < each; ++s)
            experts[row * each + s] =
                static_cast<std::int64_t>(load_float(index.data, row * index.stride[0] + s, index.dtype));
    return {experts.data(), input.rows() * each, routes.experts};
}

std::byte* row_of(const View& view, std::int64_t row) {
    return static_cast<std::byte*>(view.data) + row * view.stride[0] * size_of(view.dtype);
}

}  // namespace

Work gather(Routes routes, Columns in, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View from = buffers[in], to = buffers[out];
        const Groups groups = by_expert(input, buffers, routes);
        const auto rows = static_cast<std::int64_t>(groups.order.size());
        const auto bytes = static_cast<std::size_t>(in.width * size_of(from.dtype));
        const int threads = worthwhile_threads(input.n_threads, 0.1 * static_cast<double>(rows * in.width));
        parallel_for(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; ++row)
                std::memcpy(row_of(to, row), row_of(from, groups.order[row] / routes.index.width), bytes);
        });
    };
}

Work project_gathered(Projection stack, Routes routes, Columns in, Columns out, std::vector<std::int64_t> slots) {
    return [=, slots = std::move(slots)](const Input& input, const Buffers& buffers) {
        const View x = buffers[in], y = buffers[out];
        const Groups groups = by_expert(input, buffers, routes);
        for (std::int64_t i = 0; i < routes.experts; ++i) {
            const std::int64_t slot = slots.empty() ? i : slots[static_cast<std::size_t>(i)];
            if (const std::int64_t rows = groups.size(i); rows > 0 && slot >= 0)
                stack.rows(slot * out.width, out.width)(row_of(x, groups.first[i]), x.dtype, x.stride[0],
                                                        row_of(y, groups.first[i]), y.dtype, rows, input.n_threads,
                                                        input.limit);
        }
    };
}

Work sum_gathered(Routes routes, Columns weights, Columns in, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const Groups groups = by_expert(input, buffers, routes);
        std::vector<std::int64_t> place(groups.order.size());
        for (std::size_t row = 0; row < place.size(); ++row) place[groups.order[row]] = static_cast<std::int64_t>(row);
        const WeightedSumArgs args{
            .x = buffers[in],
            .weights = buffers[weights],
            .out = buffers[out],
            .place = place.data(),
            .rows = input.rows(),
            .each = routes.index.width,
            .width = out.width,
            .n_threads = input.n_threads,
        };
        weighted_sum(args, input.limit);
    };
}

}  // namespace klfast::engine
