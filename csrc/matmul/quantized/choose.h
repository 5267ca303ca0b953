// The op over Vec and Ints, included by each tier after its vectors; local to the including translation unit.
#pragma once

#include "matmul/quantized/exact_many_rows.h"
#include "matmul/quantized/exact_few_rows.h"
#include "matmul/quantized/int8_few_rows.h"
#include "matmul/quantized/int8_many_rows.h"
#include "matmul/quantized/exact_several_rows.h"
#ifdef KLFAST_DOT_PLANES
#include "matmul/quantized/plane_lines.h"
#endif

namespace klfast {
namespace {

template <int Bits>
void run_exact_few(const DequantMatmulArgs& args) {
#ifdef KLFAST_DOT_PLANES
    if constexpr (Bits == 4)
        if (args.m == 1) return ExactFewRows<PlaneLines, Bits>(args).run();
#endif
    ExactFewRows<FloatLines, Bits>(args).run();
}

template <int Bits>
void run_bits(const DequantMatmulArgs& args) {
    constexpr int PanelBits = Bits == 4 ? 4 : 8;  // int6 values are bytes in a panel
    const Segments segments(args.k, args.group);
    if (args.int8_activation && args.m <= kFewRows && segments_fit_lines<Bits>(args))
        Int8FewRows<Bits>(args, segments).run();
    else if (args.int8_activation)
        run_int8<Bits>(args, segments);
    else if (args.m < kSeveralRows && words_within_groups<Bits>(args) && !is_narrow(args))
        run_exact_few<Bits>(args);
    else if (args.m < kManyRows && words_within_groups<Bits>(args))
        SeveralRows<PanelBits>(args, segments).run();
    else
        run_exact_large<PanelBits>(args, segments);
}

inline void run(const DequantMatmulArgs& args) {
    if (args.m == 0 || args.n == 0) return;
    if (args.bits == 4)
        run_bits<4>(args);
    else if (args.bits == 6)
        run_bits<6>(args);
    else
        run_bits<8>(args);
}

}  // namespace
}  // namespace klfast
