// linear at tier avx512bf16: bf16 times bf16 by vdpbf16ps; whatever else as tier avx512vnni does.
#include "linear/linear.h"
#include "vec/avx512.h"

#include "vec/ints_avx512.h"

#include "linear/few_rows.h"
#include "product/bf16.h"

namespace klfast {
namespace {

// n values from index i on, zeros behind them.
inline Ints read_pairs(const void* values, std::int64_t i, std::int64_t n) {
    const __mmask32 mask = n >= 2 * W ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return {_mm512_maskz_loadu_epi16(mask, static_cast<const std::uint16_t*>(values) + i)};
}

struct Bf16Rows {
    const LinearArgs& args;
    std::int64_t depth = args.k;

    struct Panels {
        const LinearArgs& args;
        explicit Panels(const Bf16Rows& source) : args(source.args) {}

        void load(std::int64_t n0, std::int64_t vectors, std::int32_t* pairs, float* scale) const {
            const std::int64_t pairs_in_all = (args.k + 1) / 2;
            for (std::int64_t v = 0; v < vectors; ++v) {
                store(scale + v * W, set(1.0f));
                for (std::int64_t p = 0; p < pairs_in_all; p += W) {
                    Ints rows[W];
                    for (int lane = 0; lane < W; ++lane) rows[lane] = row(smaller(n0 + v * W + lane, args.n - 1), 2 * p);
                    transpose(rows);
                    for (int i = 0; i < smaller(W, pairs_in_all - p); ++i) write(pairs + ((p + i) * vectors + v) * W, rows[i]);
                }
            }
        }

        // Values k .. k + 2 W of row n, zeros behind the last.
        Ints row(std::int64_t n, std::int64_t k) const { return read_pairs(args.weight, n * args.weight_stride + k, args.k - k); }
    };
};

// Pairs along k.
struct PairTerms {
    static constexpr int values = 2 * W, size = 2;

    static void arrange(const LinearArgs& a, std::int64_t i, std::int64_t n, std::int32_t* out) { write(out, read_pairs(a.x, i, n)); }
    static Ints read(const void* weight, std::int64_t i, std::int64_t n) { return read_pairs(weight, i, n); }
    static Vec add(Vec sum, Ints weight, const std::int32_t* x) {
        return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(weight.v), reinterpret_cast<__m512bh>(klfast::read(x).v))};
    }
};

}  // namespace

namespace avx512bf16 {

void linear(const LinearArgs& args) {
    if (args.x_type != DType::bf16 || args.weight_type != DType::bf16) return avx512vnni::linear(args);
    if (args.m == 0 || args.n == 0) return;
    if (args.m <= kFewRows) FewRows<PairTerms>(args).run();
    else product_bf16(args, Bf16Rows{args});
}

}  // namespace avx512bf16
}  // namespace klfast
