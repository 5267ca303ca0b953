// dequant_matmul at tier amx: several rows of x by tiles, "int8" in tdpbssd and "exact" with bf16 x in tdpbf16ps, where
// no tile meets two groups; whatever else as tier avx512bf16 does.
#include "matmul/quantized/dequant_matmul.h"
#include "simd/avx512vnni.h"

#include "matmul/quantized/int8_many_rows_amx.h"
#include "matmul/quantized/exact_bf16_source.h"
#include "gemm/amx_bf16.h"

namespace klfast::avx512bf16 {
void dequant_matmul(const DequantMatmulArgs&);
}

namespace klfast {
namespace {

template <int Bits>
void run_bf16(const DequantMatmulArgs& a) {
    const Segments segments(a.k, a.group);
    product_bf16_tiles(a, QuantizedPairs<Bits>{.args = a, .segments = segments});
}

// Whether groups begin where tiles do, for tiles of `values` values along k.
bool tiles_within_groups(const DequantMatmulArgs& a, std::int64_t values) {
    return a.group % values == 0 || a.groups() <= 1;
}

// The fewest rows that tiles, which always multiply sixteen, take less time for than tier avx512bf16
// (docs/KERNEL_NOTES.md).
template <int Bits>
std::int64_t fewest_rows(const DequantMatmulArgs& a) {
    if (a.int8_activation) return Bits == 4 ? 6 : 7;
    return Bits == 4 ? 4 : 3;
}

template <int Bits>
void run_tiles(const DequantMatmulArgs& a) {
    if (a.m < fewest_rows<Bits>(a)) return avx512bf16::dequant_matmul(a);
    if (a.int8_activation && tiles_within_groups(a, 64))
        run_int8_tiles<Bits>(a, 16);
    else if (a.int8_activation && tiles_within_groups(a, 32))
        run_int8_tiles<Bits>(a, 8);
    else if (!a.int8_activation && a.x_type == DType::bf16 && tiles_within_groups(a, 32))
        run_bf16<Bits>(a);
    else
        avx512bf16::dequant_matmul(a);
}

}  // namespace

namespace amx {

void dequant_matmul(const DequantMatmulArgs& a) {
    if (a.n == 0) return;
    if (a.bits == 4)
        run_tiles<4>(a);
    else
        run_tiles<8>(a);  // int6 as int8: its words come as bytes
}

}  // namespace amx
}  // namespace klfast
