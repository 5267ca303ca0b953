#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "engine/instructions.h"
#include "matmul/quantized/rows.h"

namespace klfast::engine {

namespace {

// Work of an embedding whose rows read(row, out) fetches as floats.
template <class Read>
Work embedding(Read read, DType rounded_to, float scale, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View rows = buffers[out];
        const int threads = worthwhile_threads(input.n_threads, 4.0 * input.rows() * out.width);
        parallel_for(input.rows(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
            std::vector<float> values(out.width);
            const auto step = [&](float v) { return rounded(v, rounded_to); };
            for (std::int64_t row = begin; row < end; ++row) {
                read(input.tokens[row], values.data());
                for (std::int64_t i = 0; i < out.width; ++i)
                    store_float(rows.data, row * rows.stride[0] + i, rows.dtype, step(scale * step(values[i])));
            }
        });
    };
}

}  // namespace

Work embed(View table, std::int64_t vocabulary, View more, DType rounded_to, float scale, Columns out) {
    const auto read = [=, width = out.width](std::int64_t row, float* values) {
        const View& of = row < vocabulary ? table : more;
        const std::int64_t from = (row < vocabulary ? row : row - vocabulary) * of.stride[0];
        for (std::int64_t i = 0; i < width; ++i) values[i] = load_float(of.data, from + i, of.dtype);
    };
    return embedding(read, rounded_to, scale, out);
}

Work embed_quantized(Projection tied, View more, DType rounded_to, float scale, Columns out,
                     std::vector<std::int32_t> corrected, std::optional<Projection> correction) {
    const auto read = [=, width = out.width](std::int64_t row, float* values) {
        const DequantMatmulArgs& table = *tied.quantized();
        if (row < table.n) {
            dequantize_row(table, row, values);
            const auto found = std::lower_bound(corrected.begin(), corrected.end(), row);
            if (found == corrected.end() || *found != row) return;
            std::vector<float> added(width);
            dequantize_row(*correction->quantized(), found - corrected.begin(), added.data());
            for (std::int64_t i = 0; i < width; ++i) values[i] += added[i];
            return;
        }
        for (std::int64_t i = 0; i < width; ++i)
            values[i] = load_float(more.data, (row - table.n) * more.stride[0] + i, more.dtype);
    };
    return embedding(read, rounded_to, scale, out);
}

Work project(Projection layer, Columns in, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View x = buffers[in], y = buffers[out];
        layer(x.data, x.dtype, x.stride[0], y.data, y.dtype, input.rows(), input.n_threads, input.limit);
    };
}

Work project_last(Projection layer, Columns in, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View x = buffers[in], y = buffers[out];
        const std::int64_t step = input.each_token ? 1 : input.length, stride = x.stride[0] * step;
        const auto* const first = static_cast<const std::byte*>(x.data) + (stride - x.stride[0]) * size_of(x.dtype);
        layer(first, x.dtype, stride, y.data, y.dtype, input.rows() / step, input.n_threads, input.limit);
    };
}

}  // namespace klfast::engine
