// gathered_logits over Vec: a token's rows of the head come from memory once and meet all students in cache.
#pragma once

#include "core/parallel.h"
#include "divergence/gathered/gathered_logits.h"
#include "simd/tile_io.h"
#include "simd/unrolled.h"

namespace klfast {
namespace {

constexpr int kGathered = 3, kStudents = 4;  // rows of the head by students: 12 sums

// R rows of the head times S students, both [.., pitch]; out[s * out_pitch + r].
template <int R, int S>
void gathered_tile(const float* rows, const float* students, std::int64_t pitch, float* out, std::int64_t out_pitch) {
    Vec total[R][S];
    unrolled<R>([&](int r) KLFAST_INLINE { unrolled<S>([&](int s) KLFAST_INLINE { total[r][s] = set(0.0f); }); });
    for (std::int64_t k = 0; k < pitch; k += kLanes) {
        Vec row[R];
        unrolled<R>([&](int r) KLFAST_INLINE { row[r] = load(rows + r * pitch + k); });
        unrolled<S>([&](int s) KLFAST_INLINE {
            const Vec x = load(students + s * pitch + k);
            unrolled<R>([&](int r) KLFAST_INLINE { total[r][s] = fma(row[r], x, total[r][s]); });
        });
    }
    unrolled<S>([&](int s) KLFAST_INLINE {
        unrolled<R>([&](int r) KLFAST_INLINE { out[s * out_pitch + r] = sum(total[r][s]); });
    });
}

template <int R>
void gathered_rows(const float* rows, const float* students, std::int64_t count, std::int64_t pitch, float* out,
                   std::int64_t out_pitch) {
    std::int64_t s = 0;
    for (; s + kStudents <= count; s += kStudents)
        gathered_tile<R, kStudents>(rows, students + s * pitch, pitch, out + s * out_pitch, out_pitch);
    for (; s < count; ++s) gathered_tile<R, 1>(rows, students + s * pitch, pitch, out + s * out_pitch, out_pitch);
}

inline void run(const GatheredLogitsArgs& a) {
    const std::int64_t pitch = round_up(a.features, kLanes), out_pitch = a.tokens * a.entries;
    const int threads = worthwhile_threads(a.n_threads, 1.0 * a.students * out_pitch * a.features);
    parallel_for(a.tokens, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        const Buffer<float> scratch((a.students + kGathered) * pitch);
        float *const students = scratch.data, *const rows = students + a.students * pitch;
        for (std::int64_t t = begin; t < end; ++t) {
            load_tile(students, pitch, a.hidden, t * a.hidden.stride[1], a.hidden.stride[2], a.hidden.stride[0],
                      a.features, a.students);
            for (std::int64_t j = 0; j < a.entries; j += kGathered) {
                const std::int64_t some = smaller(kGathered, a.entries - j);
                for (std::int64_t r = 0; r < some; ++r)
                    load_tile(rows + r * pitch, pitch, a.head, a.index[t * a.entries + j + r] * a.head.stride[0],
                              a.head.stride[1], 0, a.features, 1);
                float* const out = a.out + t * a.entries + j;
                if (some == kGathered) {
                    gathered_rows<kGathered>(rows, students, a.students, pitch, out, out_pitch);
                } else {
                    for (std::int64_t r = 0; r < some; ++r)
                        gathered_rows<1>(rows + r * pitch, students, a.students, pitch, out + r, out_pitch);
                }
            }
        }
    });
}

}  // namespace
}  // namespace klfast
