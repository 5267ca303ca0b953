#include <cmath>
#include <cstring>
#include <vector>

#include "attention/decode_attention.h"
#include "core/parallel.h"
#include "engine/instructions.h"

namespace klfast::engine {
namespace {

// work(row, position) for each row of the run.
template <class Function>
void each_row(const Input& input, double operations, Function&& work) {
    const int threads = worthwhile_threads(input.n_threads, operations * static_cast<double>(input.rows()));
    parallel_for(input.rows(), 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) work(row, input.seen[row / input.length] + row % input.length);
    });
}

template <class T>
void rotate_row(T* x, std::int64_t half, DType type, const float* cos, const float* sin) {
    const auto step = [&](float v) { return rounded(v, type); };
    for (std::int64_t i = 0; i < half; ++i) {
        const float a = load_float(x, i, type), b = load_float(x, half + i, type);
        store_float(x, i, type, step(a * cos[i]) + step(-b * sin[i]));
        store_float(x, half + i, type, step(b * cos[i]) + step(a * sin[i]));
    }
}

// The channels of a row's heads, as HeadCopy says. Single ones go by value: a call of memcpy for each would take longer
// than its work.
template <class T>
void copy_channels(const HeadCopy& copy, const T* in, std::int64_t in_head, T* out, std::int64_t out_head) {
    in += copy.first, out += copy.to;
    if (copy.width == 1) {
        for (std::int64_t h = 0; h < copy.heads; ++h) out[h * out_head] = in[h * in_head];
        return;
    }
    for (std::int64_t h = 0; h < copy.heads; ++h)
        std::memcpy(out + h * out_head, in + h * in_head, static_cast<std::size_t>(copy.width) * sizeof(T));
}

}  // namespace

Work angles(View frequencies, std::int64_t count, float factor, DType rounded_to, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View to = buffers[out];
        each_row(input, 80.0 * count, [&](std::int64_t row, std::int64_t position) {
            float* const cos = static_cast<float*>(to.data) + row * to.stride[0];
            for (std::int64_t i = 0; i < count; ++i) {
                const float angle = load_float(frequencies.data, i, frequencies.dtype) * static_cast<float>(position);
                cos[i] = rounded(std::cos(angle) * factor, rounded_to);
                cos[count + i] = rounded(std::sin(angle) * factor, rounded_to);
            }
        });
    };
}

Work rotate(std::int64_t heads, Columns angles, Columns x) {
    return [=](const Input& input, const Buffers& buffers) {
        const View table = buffers[angles], view = buffers[x];
        const std::int64_t half = angles.width / 2, dim = x.width / heads;
        each_row(input, 8.0 * heads * half, [&](std::int64_t row, std::int64_t) {
            const float* const cos = static_cast<const float*>(table.data) + row * table.stride[0];
            for (std::int64_t h = 0; h < heads; ++h) {
                const std::int64_t at = (row * view.stride[0] + h * dim) * size_of(view.dtype);
                rotate_row(static_cast<std::byte*>(view.data) + at, half, view.dtype, cos, cos + half);
            }
        });
    };
}

Work copy_heads(HeadCopy copy, Columns in, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        const View from = buffers[in], to = buffers[out];
        const std::int64_t in_head = copy.shared ? 0 : in.width / copy.heads, out_head = out.width / copy.heads;
        const auto rows = [&]<class T>(T* first) {
            each_row(input, 0.1 * static_cast<double>(out.width), [&](std::int64_t row, std::int64_t) {
                const T* const source = static_cast<const T*>(from.data) + row * from.stride[0];
                copy_channels(copy, source, in_head, first + row * to.stride[0], out_head);
            });
        };
        if (from.dtype == DType::f32)
            rows(static_cast<float*>(to.data));
        else
            rows(static_cast<std::uint16_t*>(to.data));
    };
}

Work remember(int state, std::int64_t heads, Columns in) {
    return [=](const Input& input, const Buffers& buffers) {
        const View from = buffers[in], cache = input.states[state];
        const std::int64_t size = size_of(from.dtype), width = in.width / heads;
        each_row(input, 0.1 * static_cast<double>(in.width), [&](std::int64_t row, std::int64_t position) {
            for (std::int64_t h = 0; h < heads; ++h)
                std::memcpy(
                    static_cast<std::byte*>(cache.data) + size * (row / input.length * cache.stride[0] +
                                                                  h * cache.stride[1] + position * cache.stride[2]),
                    static_cast<const std::byte*>(from.data) + size * (row * from.stride[0] + h * width),
                    static_cast<std::size_t>(width * size));
        });
    };
}

Work attend(Attention layer, Columns q, Columns out) {
    return [=](const Input& input, const Buffers& buffers) {
        std::vector<std::int64_t> keys(input.seen, input.seen + input.sequences);
        for (std::int64_t& count : keys) count += input.length;
        const DecodeAttentionArgs args{
            .q = buffers.by_head(q, input.length, layer.heads),
            .k = input.states[layer.keys],
            .v = input.states[layer.values],
            .out = buffers.by_head(out, input.length, layer.heads),
            .batch = input.sequences,
            .length = input.length,
            .heads = layer.heads,
            .groups = layer.groups,
            .keys = 0,
            .key_dim = layer.key_dim,
            .value_dim = layer.value_dim,
            .keys_of = keys.data(),
            .window = layer.window,
            .sinks = layer.sinks,
            .scale = layer.scale,
            .n_threads = input.n_threads,
        };
        decode_attention(args, input.limit);
    };
}

}  // namespace klfast::engine
