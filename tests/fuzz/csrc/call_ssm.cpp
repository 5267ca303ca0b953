#include <limits>
#include <utility>
#include <vector>

#include "calls.h"
#include "operand.h"
#include "prepared/mamba_step.h"
#include "ssm/conv/causal_conv1d.h"
#include "ssm/delta/gated_delta_rule.h"
#include "ssm/scan/scan.h"

namespace klfast::fuzz {
namespace {

// Which of `count` states belongs to each entry of a batch: its own number, or distinct ones among others and padding.
class DrawnSlots {
  public:
    const Int count;

    DrawnSlots(Input& input, Int batch)
        : count(batch + input.index(4)),
          is_given_(input.flag()),
          padding_(input.one_of<Int>({-1, 0, count})),
          of_(batch) {
        const Int first = input.index(count + 1);
        for (Int b = 0; b < batch; ++b) of_[b] = input.byte() % 8 == 0 ? padding_ : (first + b) % count;
    }

    Slots view() const { return is_given_ ? Slots{.of = of_.data(), .padding = padding_} : Slots{}; }

  private:
    bool is_given_;
    Int padding_;
    std::vector<Int> of_;
};

}  // namespace

void call_causal_conv1d(Input& input, How how) {
    const Int channels = input.size(600), length = input.size(80), width = input.size(9, 1), batch = input.size(4),
              initial_length = width - 1 + input.index(5), final_length = input.index(initial_length + length + 1);
    const Operand x = Operand::read(input, {batch, channels, length}), weight = Operand::read(input, {channels, width}),
                  bias = Operand::read(input, {channels}),
                  initial = Operand::read(input, {batch, channels, initial_length}),
                  final = Operand::written(input, {batch, channels, final_length}),
                  out = Operand::written(input, {batch, channels, length});
    causal_conv1d(
        {
            .x = x.view(),
            .out = out.view(),
            .weight = weight.view(),
            .bias = bias.maybe(input),
            .initial = initial.maybe(input),
            .final = final.maybe(input),
            .batch = batch,
            .channels = channels,
            .length = length,
            .width = width,
            .initial_length = initial_length,
            .final_length = final_length,
            .silu = input.flag(),
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_causal_conv1d_update(Input& input, How how) {
    const Int channels = input.size(600), length = input.size(40), width = input.size(9, 1), batch = input.size(4),
              held = width - 1 + input.index(5);
    const DrawnSlots slots(input, batch);
    const Operand x = Operand::read(input, {batch, channels, length}), weight = Operand::read(input, {channels, width}),
                  bias = Operand::read(input, {channels}),
                  state = Operand::written(input, {slots.count, channels, held}),
                  out = Operand::written(input, {batch, channels, length});
    std::vector<Int> seen(batch);
    for (Int& steps : seen) steps = input.one_of<Int>({0, 1, 5, 1000, INT64_MAX});
    causal_conv1d(
        {
            .x = x.view(),
            .out = out.view(),
            .weight = weight.view(),
            .bias = bias.maybe(input),
            .initial = state.view(),
            .final = state.view(),
            .slots = slots.view(),
            .steps_seen = held > 0 && input.flag() ? seen.data() : nullptr,
            .batch = batch,
            .channels = channels,
            .length = length,
            .width = width,
            .initial_length = held,
            .final_length = held,
            .silu = input.flag(),
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_selective_scan(Input& input, How how) {
    const Int states = input.size(40), length = input.size(70), each = input.size(80), batch = input.size(3);
    const bool constant_b = input.flag(), constant_c = input.flag();
    const Int groups = constant_b && constant_c ? 1 : input.size(4, 1), channels = groups * each;
    const auto shared = [&](bool is_constant) {
        return Operand::read(input, is_constant ? Shape{channels, states} : Shape{batch, groups, states, length});
    };
    const Shape by_time{batch, channels, length}, of_states{batch, channels, states};
    const Operand u = Operand::read(input, by_time), delta = Operand::read(input, by_time),
                  z = Operand::read(input, by_time), out = Operand::written(input, by_time),
                  a = Operand::read(input, {channels, states}), b = shared(constant_b), c = shared(constant_c),
                  d = Operand::read(input, {channels}), delta_bias = Operand::read(input, {channels}),
                  before = Operand::read(input, of_states), after = Operand::written(input, of_states);
    selective_scan(
        {
            .u = u.view(),
            .delta = delta.view(),
            .z = z.maybe(input),
            .out = out.view(),
            .a = a.view(),
            .b = b.view(),
            .c = c.view(),
            .d = d.maybe(input),
            .delta_bias = delta_bias.maybe(input),
            .initial = input.flag() ? after.view() : before.maybe(input),
            .state = after.view(),
            .batch = batch,
            .channels = channels,
            .length = length,
            .groups = groups,
            .states = states,
            .constant_b = constant_b,
            .constant_c = constant_c,
            .softplus = input.flag(),
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_selective_state_update(Input& input, How how) {
    const Int states = input.size(150), dim = input.size(100), each = input.size(4), groups = input.size(4, 1),
              batch = input.size(4), heads = groups * each;
    const DrawnSlots slots(input, batch);
    const Shape whole{batch, heads, dim}, of_head{heads, dim}, of_group{batch, groups, states};
    const Operand state = Operand::written(input, {slots.count, heads, dim, states}), x = Operand::read(input, whole),
                  dt = Operand::read(input, whole), z = Operand::read(input, whole),
                  out = Operand::written(input, whole), a = Operand::read(input, {heads, dim, states}),
                  b = Operand::read(input, of_group), c = Operand::read(input, of_group),
                  d = Operand::read(input, of_head), dt_bias = Operand::read(input, of_head);
    selective_state_update(
        {
            .state = state.view(),
            .x = x.view(),
            .dt = dt.view(),
            .z = z.maybe(input),
            .out = out.view(),
            .a = a.view(),
            .b = b.view(),
            .c = c.view(),
            .d = d.maybe(input),
            .dt_bias = dt_bias.maybe(input),
            .slots = slots.view(),
            .batch = batch,
            .heads = heads,
            .dim = dim,
            .groups = groups,
            .states = states,
            .softplus = input.flag(),
            .a_is_log = input.flag(),
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_mamba_chunk_scan(Input& input, How how) {
    const Int states = input.size(150), length = input.size(150), dim = input.size(80), each = input.size(4),
              groups = input.size(4, 1), batch = input.size(3), heads = groups * each;
    const Shape whole{batch, length, heads, dim}, of_group{batch, length, groups, states},
        of_states{batch, heads, dim, states};
    const Operand x = Operand::read(input, whole), z = Operand::read(input, whole),
                  out = Operand::written(input, whole), dt = Operand::read(input, {batch, length, heads}),
                  a = Operand::read(input, {heads}), dt_bias = Operand::read(input, {heads}),
                  b = Operand::read(input, of_group), c = Operand::read(input, of_group),
                  d = Operand::read(input, {heads, dim}), before = Operand::read(input, of_states),
                  after = Operand::written(input, of_states);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const auto [low, high] =
        input.one_of<std::pair<float, float>>({{0.0f, kInfinity}, {0.1f, 0.5f}, {-kInfinity, -1.0f}});
    mamba_chunk_scan(
        {
            .x = x.view(),
            .z = z.maybe(input),
            .out = out.view(),
            .dt = dt.view(),
            .a = a.view(),
            .dt_bias = dt_bias.maybe(input),
            .b = b.view(),
            .c = c.view(),
            .d = d.maybe(input),
            .initial = input.flag() ? after.view() : before.maybe(input),
            .final = after.view(),
            .batch = batch,
            .length = length,
            .heads = heads,
            .dim = dim,
            .groups = groups,
            .states = states,
            .softplus = input.flag(),
            .dt_min = low,
            .dt_max = high,
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_gated_delta_rule(Input& input, How how) {
    const Int key_dim = input.size(150, 1), value_dim = input.size(150), length = input.size(80),
              key_heads = input.size(3, 1), each = input.size(3), batch = input.size(3), heads = key_heads * each;
    const Shape of_keys{batch, length, key_heads, key_dim}, of_values{batch, length, heads, value_dim};
    const Operand q = Operand::read(input, of_keys), k = Operand::read(input, of_keys),
                  v = Operand::read(input, of_values), out = Operand::written(input, of_values),
                  g = Operand::read(input, {batch, length, heads, key_dim}),
                  beta = Operand::read(input, {batch, length, heads}),
                  state = Operand::written(input, {batch, heads, key_dim, value_dim});
    gated_delta_rule(
        {
            .q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .out = out.view(),
            .g = g.view(),
            .beta = beta.view(),
            .state = state.view(),
            .batch = batch,
            .length = length,
            .key_heads = key_heads,
            .heads = heads,
            .key_dim = key_dim,
            .value_dim = value_dim,
            .normalize = input.flag(),
            .scale = input.one_of({0.25f, -3.0f, 0.0f}),
            .n_threads = how.n_threads,
        },
        how.limit);
}

void call_mamba_step(Input& input, How how) {
    const Int channels = input.size(200, 1), states = input.size(40, 1), rank = input.size(30, 1),
              width = input.size(6, 1), batch = input.size(4), parts = rank + 2 * states,
              conv_length = width - 1 + input.index(3);
    const DType type = Operand::draw_dtype(input);
    const auto dense = [&](const Operand& weight, Int n, Int k) {
        Product product{};
        product.n = n, product.k = k;
        return Projection(LinearArgs{product, {.weight = weight.data(), .weight_type = type, .weight_stride = k}});
    };
    const Operand x_weight = Operand::read(input, {parts, channels}, type, Strides::dense),
                  dt_weight = Operand::read(input, {channels, rank}, type, Strides::dense),
                  conv_weight = Operand::read(input, {channels, width}), conv_bias = Operand::read(input, {channels}),
                  dt_norm = Operand::read(input, {rank}), b_norm = Operand::read(input, {states}),
                  c_norm = Operand::read(input, {states}), a_log = Operand::read(input, {channels, states}),
                  d = Operand::read(input, {channels}), dt_bias = Operand::read(input, {channels}),
                  x = Operand::read(input, {batch, channels}, type), z = Operand::read(input, {batch, channels}, type),
                  out = Operand::written(input, {batch, channels}, type),
                  conv_state = Operand::written(input, {batch, channels, conv_length}),
                  ssm_state = Operand::written(input, {batch, channels, states});
    const MambaMixer mixer{
        .conv_weight = conv_weight.view(),
        .conv_bias = conv_bias.maybe(input),
        .x_proj = dense(x_weight, parts, channels),
        .dt_proj = dense(dt_weight, channels, rank),
        .normed = input.flag(),
        .dt_norm = dt_norm.maybe(input),
        .b_norm = b_norm.maybe(input),
        .c_norm = c_norm.maybe(input),
        .eps = 1e-6f,
        .a_log = a_log.view(),
        .d = d.view(),
        .dt_bias = dt_bias.view(),
        .channels = channels,
        .width = width,
        .rank = rank,
        .states = states,
    };
    mamba_step(mixer,
               {
                   .x = x.view(),
                   .z = z.view(),
                   .out = out.view(),
                   .conv_state = conv_state.view(),
                   .ssm_state = ssm_state.view(),
                   .batch = batch,
                   .conv_length = conv_length,
                   .n_threads = how.n_threads,
               },
               how.limit);
}

}  // namespace klfast::fuzz
