#include "matmul/quantized/grouped.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "core/buffer.h"
#include "core/parallel.h"
#include "matmul/blocks.h"
#include "matmul/groups.h"

namespace klfast {
namespace {

class Grouped {
  public:
    explicit Grouped(const GroupedDequantMatmulArgs& args)
        : a(args),
          groups(a.index, a.one.m * a.each, a.count),
          x_row(a.one.x_stride * size_of(a.one.x_type)),
          y_row(a.one.n * size_of(a.one.y_type)),
          most(largest()),
          x(most > 1 ? most * a.one.k * size_of(a.one.x_type) : 0),
          y(most > 1 ? most * y_row : 0) {}

    void run(Tier limit) const {
        for (std::int64_t i = 0; i < a.count; ++i) {
            const std::int64_t* const rows = groups.order.data() + groups.first[i];
            const std::int64_t m = groups.size(i);
            if (m == 0) continue;
            DequantMatmulArgs args = block(a.one, i * a.one.n, a.one.n);
            args.m = m;
            if (m == 1 || (a.each == 1 && rows[m - 1] - rows[0] == m - 1)) {
                args.x = x_at(rows[0]), args.y = y_at(rows[0]);
                dequant_matmul(args, limit);
                continue;
            }
            const std::int64_t bytes = a.one.k * size_of(a.one.x_type);
            each_row(m, bytes, [&](std::int64_t r) { std::memcpy(x.data + r * bytes, x_at(rows[r]), bytes); });
            args.x = x.data, args.x_stride = a.one.k, args.y = y.data;
            dequant_matmul(args, limit);
            each_row(m, y_row, [&](std::int64_t r) { std::memcpy(y_at(rows[r]), y.data + r * y_row, y_row); });
        }
    }

  private:
    std::int64_t largest() const {
        std::int64_t found = 0;
        for (std::int64_t i = 0; i < a.count; ++i) found = std::max(found, groups.size(i));
        return found;
    }

    // The row of x that row `row` of y comes from.
    const std::byte* x_at(std::int64_t row) const {
        return static_cast<const std::byte*>(a.one.x) + row / a.each * x_row;
    }

    std::byte* y_at(std::int64_t row) const { return static_cast<std::byte*>(a.one.y) + row * y_row; }

    template <class Copy>
    void each_row(std::int64_t rows, std::int64_t bytes, Copy&& copy) const {
        if (bytes == 0) return;  // memcpy may not be given a null pointer, even for nothing
        const int threads = worthwhile_threads(a.one.n_threads, static_cast<double>(rows) * static_cast<double>(bytes));
        parallel_for(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t r = begin; r < end; ++r) copy(r);
        });
    }

    const GroupedDequantMatmulArgs& a;
    const Groups groups;              // of y's rows
    const std::int64_t x_row, y_row;  // bytes
    const std::int64_t most;          // rows of one matrix
    Buffer<std::byte> x, y;           // rows of one matrix, side by side
};

}  // namespace

bool grouped_dequant_matmul(const GroupedDequantMatmulArgs& args, Tier limit) {
    const std::int64_t rows = args.one.m * args.each;
    const auto is_known = [&](std::int64_t i) { return 0 <= i && i < args.count; };
    if (!std::all_of(args.index, args.index + rows, is_known)) return false;
    if (rows > 0) Grouped(args).run(limit);
    return true;
}

}  // namespace klfast
