// A linear layer with all that a call needs but its rows: where its weight lies and how that is stored.
#pragma once

#include <cstdint>
#include <variant>

#include "matmul/blocks.h"

namespace klfast {

class Projection {
  public:
    explicit Projection(const LinearArgs& layer) : layer_(layer) {}
    explicit Projection(const DequantMatmulArgs& layer) : layer_(layer) {}

    std::int64_t n() const {
        return std::visit([](const auto& layer) { return layer.n; }, layer_);
    }
    std::int64_t k() const {
        return std::visit([](const auto& layer) { return layer.k; }, layer_);
    }

    // The product with the weight alone, as Python code makes it that takes layer.weight: without bias, and of
    // unrounded rows.
    Projection weight_only() const {
        Projection other = *this;
        std::visit([](auto& layer) { layer.bias = nullptr; }, other.layer_);
        if (auto* quantized = std::get_if<DequantMatmulArgs>(&other.layer_)) quantized->int8_activation = false;
        return other;
    }

    // The product with rows first .. first + n of the weight, without bias.
    Projection rows(std::int64_t first, std::int64_t n) const {
        return std::visit([&](const auto& layer) { return Projection(block(layer, first, n)); }, layer_);
    }

    // The weight, if it is quantized, else nullptr.
    const DequantMatmulArgs* quantized() const { return std::get_if<DequantMatmulArgs>(&layer_); }

    // y [rows, n], contiguous, from x [rows, k] with x_stride elements from row to row; both of `type`.
    void operator()(const void* x, DType type, std::int64_t x_stride, void* y, std::int64_t rows, int n_threads,
                    Tier limit) const {
        (*this)(x, type, x_stride, y, type, rows, n_threads, limit);
    }

    // The same, rounded to `type` but stored as y_type.
    void operator()(const void* x, DType type, std::int64_t x_stride, void* y, DType y_type, std::int64_t rows,
                    int n_threads, Tier limit) const {
        std::visit(
            [&](auto args) {
                args.x = x, args.x_type = type, args.x_stride = x_stride, args.y = y, args.y_type = y_type,
                args.rounded_to = type, args.m = rows, args.n_threads = n_threads;
                multiply(args, limit);
            },
            layer_);
    }

  private:
    static void multiply(const LinearArgs& args, Tier limit) { linear(args, limit); }
    static void multiply(const DequantMatmulArgs& args, Tier limit) { dequant_matmul(args, limit); }

    std::variant<LinearArgs, DequantMatmulArgs> layer_;
};

}  // namespace klfast
