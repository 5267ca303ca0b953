#include "prepared/mamba_step.h"

#include <cstddef>
#include <vector>

#include "ssm/conv/causal_conv1d.h"
#include "norm/rms_norm.h"
#include "ssm/scan/scan.h"

namespace klfast {

void mamba_step(const MambaMixer& m, const MambaStepArgs& a, Tier limit) {
    const DType type = a.x.dtype;
    const std::int64_t parts = m.rank + 2 * m.states;
    std::vector<std::byte> memory(a.batch * (2 * m.channels + parts) * size_of(type));
    const auto rows = [&](std::int64_t first,
                          std::int64_t width) {  // [batch, width], contiguous, first elements into the memory
        return View{memory.data() + first * size_of(type), type, {width, 1}};
    };
    const auto from = [&](View v, std::int64_t element) {
        v.data = static_cast<std::byte*>(v.data) + element * size_of(v.dtype);
        return v;
    };
    const auto in_time = [](View v, std::int64_t batch_stride, std::int64_t stride) {
        v.stride[0] = batch_stride, v.stride[1] = stride, v.stride[2] = 1;
        return v;
    };

    const View u = rows(0, m.channels), delta = rows(a.batch * m.channels, m.channels),
               projected = rows(2 * a.batch * m.channels, parts);
    causal_conv1d(
        {in_time(a.x, a.x.stride[0], a.x.stride[1]), in_time(u, m.channels, 1), m.conv_weight, m.conv_bias,
         a.conv_state, a.conv_state, a.batch, m.channels, 1, m.width, a.conv_length, a.conv_length, true, a.n_threads},
        limit);

    m.x_proj(u.data, type, m.channels, projected.data, a.batch, a.n_threads, limit);
    const View b = from(projected, m.rank), c = from(b, m.states);
    const auto norm = [&](const View& weight, View part, std::int64_t width) {
        part.stride[1] = 0, part.stride[2] = 1;  // [batch, 1, width]
        rms_norm({part, {}, part, weight, a.batch, 1, width, width, m.eps, a.n_threads}, limit);
    };
    if (m.normed) norm(m.dt_norm, projected, m.rank), norm(m.b_norm, b, m.states), norm(m.c_norm, c, m.states);
    m.dt_proj(projected.data, type, parts, delta.data, a.batch, a.n_threads, limit);

    const auto one_head = [](View v) {  // [batch, channels, ...] as [batch, 1, channels, ...]
        v.stride[3] = v.stride[2], v.stride[2] = v.stride[1], v.stride[1] = 0;
        return v;
    };
    const auto no_batch = [](View v) {  // [channels, ...] as [1, channels, ...]
        v.stride[2] = v.stride[1], v.stride[1] = v.stride[0], v.stride[0] = 0;
        return v;
    };
    selective_state_update({one_head(a.ssm_state), one_head(u), one_head(delta), one_head(a.z), one_head(a.out),
                            no_batch(m.a_log), one_head(b), one_head(c), no_batch(m.d), no_batch(m.dt_bias), a.batch, 1,
                            m.channels, 1, m.states, true, true, a.n_threads},
                           limit);
}

}  // namespace klfast
