// The matrix instructions of Intel's GPUs as OpenCL C, for a CPU. A sub-group of 16 work items computes d = a b + acc of an
// 8 x K matrix a, a K x 16 matrix b and an 8 x 16 matrix acc: work item l has column l of b, acc and d, and columns K / 16 * l
// and following of a, in whose element m lies row m. float32 sums take one product after the other.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION cl_intel_subgroups : enable
#pragma OPENCL EXTENSION cl_intel_subgroups_short : enable

#define FROM(a, m, l) intel_sub_group_shuffle(a[m], (uint)(l))

__attribute__((overloadable)) float from_bf16(ushort x) { return as_float((uint)x << 16); }

// K = 16, two elements of a column of b in each int, the earlier one in the lower half; a has one column a work item.
#define FLOAT_PRODUCT(NAME, FLOAT_OF, PAIR, AS_PAIR, AS_ONE)                                          \
    __attribute__((noinline, overloadable)) float8 NAME(short8 a, int8 b, float8 acc) {               \
        short rows[8];                                                                                \
        int column[8];                                                                                \
        float sums[8];                                                                                \
        vstore8(a, 0, rows);                                                                          \
        vstore8(b, 0, column);                                                                        \
        vstore8(acc, 0, sums);                                                                        \
        for (int i = 0; i < 8; ++i) {                                                                 \
            const PAIR pair = AS_PAIR(column[i]);                                                     \
            const float first = FLOAT_OF(pair.x), second = FLOAT_OF(pair.y);                          \
            for (int m = 0; m < 8; ++m) {                                                             \
                sums[m] += FLOAT_OF(AS_ONE(FROM(rows, m, 2 * i))) * first;                         \
                sums[m] += FLOAT_OF(AS_ONE(FROM(rows, m, 2 * i + 1))) * second;                    \
            }                                                                                         \
        }                                                                                             \
        return vload8(0, sums);                                                                       \
    }

FLOAT_PRODUCT(intel_sub_group_f16_f16_matrix_mad_k16, convert_float, half2, as_half2, as_half)
FLOAT_PRODUCT(intel_sub_group_bf16_bf16_matrix_mad_k16, from_bf16, ushort2, as_ushort2, as_ushort)

// K = 32, four elements of a column of b in each int; a has two columns a work item.
__attribute__((noinline, overloadable)) int8 intel_sub_group_i8_i8_matrix_mad_k32(short8 a, int8 b, int8 acc) {
    short rows[8];
    int column[8], sums[8];
    vstore8(a, 0, rows);
    vstore8(b, 0, column);
    vstore8(acc, 0, sums);
    for (int i = 0; i < 8; ++i) {
        const char4 four = as_char4(column[i]);
        for (int m = 0; m < 8; ++m) {
            const char2 low = as_char2(FROM(rows, m, 2 * i)), high = as_char2(FROM(rows, m, 2 * i + 1));
            sums[m] += low.x * four.x + low.y * four.y + high.x * four.z + high.y * four.w;
        }
    }
    return vload8(0, sums);
}
