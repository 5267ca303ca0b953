#include "check_program.h"

#include <deque>
#include <vector>

#include "../check.h"
#include "engine/instructions.h"

namespace klfast::test {
namespace {

using engine::Columns;

constexpr Int kWidth = 32, kVocabulary = 41, kSequences = 2, kPrompt = 20, kTokens = 5, kRows = kSequences * kPrompt;

// Columns first .. first + width of other ones.
Columns part(Columns of, Int first, Int width) { return {of.buffer, of.first + first, width}; }

// A residual stream to which each kind of mixer adds its result.
class Model {
  public:
    Model() {
        program_.add("embed", engine::embed(random({kVocabulary, kWidth}), kVocabulary, {}, DType::f32, 1.0f, hidden_));
        add_mamba();
        add_mamba2();
        add_attention();
        add_delta_rule();
        add_experts();
        program_.add("head", engine::project_last(quantized(kVocabulary, kWidth), normalised(), logits_));
    }

    // The logits of a prompt's last token and of each token after it, [1 + kTokens, kSequences, kVocabulary].
    std::vector<float> run(int n_threads, Tier limit) {
        for (Tensor& state : states_)
            for (Int i = 0; i < state.size(); ++i) state.set(i, 0.0);
        engine::States states;
        for (Tensor& state : states_) states.push_back(state.view());
        std::vector<Int> tokens(kRows), seen(kSequences);
        for (Int i = 0; i < kRows; ++i) tokens[i] = i * 7 % kVocabulary;
        std::vector<float> found;
        for (Int step = 0; step <= kTokens; ++step) {
            const Int length = step == 0 ? kPrompt : 1;
            program_.run({
                .tokens = tokens.data(),
                .seen = seen.data(),
                .sequences = kSequences,
                .length = length,
                .states = states,
                .n_threads = n_threads,
                .limit = limit,
            });
            for (Int& count : seen) count += length;
            const auto* const logits = static_cast<const float*>(program_.buffers[logits_].data);
            found.insert(found.end(), logits, logits + kSequences * kVocabulary);
        }
        return found;
    }

  private:
    View random(std::vector<Int> shape, double scale = 0.2) {
        return weights_.emplace_back(Tensor::random(DType::f32, std::move(shape), scale)).view();
    }
    View negative(std::vector<Int> shape) {
        const View view = random(std::move(shape));
        for (Int i = 0; i < weights_.back().size(); ++i) weights_.back().set(i, -1.0 - i % 3);
        return view;
    }
    int state(std::vector<Int> shape) {
        states_.emplace_back(DType::f32, std::move(shape));
        return static_cast<int>(states_.size()) - 1;
    }
    Columns buffer(Int width, Int rows = kRows) { return {program_.buffers.add(width, DType::f32, rows), 0, width}; }

    Projection dense(Int n, Int k) {
        Product product{};
        product.n = n, product.k = k;
        return Projection(LinearArgs{
            product,
            {.weight = random({n, k}).data, .weight_type = DType::f32, .weight_stride = k},
        });
    }
    // INT4 in groups of 16.
    Projection quantized(Int n, Int k) {
        Product product{};
        product.n = n, product.k = k;
        std::vector<std::int32_t>& packed = packed_.emplace_back(n * (k / 8));
        for (std::int32_t& word : packed) word = static_cast<std::int32_t>(random_int(-(Int{1} << 31), Int{1} << 31));
        return Projection(DequantMatmulArgs{
            product,
            {
                .packed = packed.data(),
                .scale = random({n, k / 16}, 0.05).data,
                .scale_type = DType::f32,
                .zero_point = nullptr,
                .bits = 4,
                .group = 16,
                .int8_activation = false,
            },
        });
    }

    Columns projected(const Projection& layer, Columns in) {
        const Columns out = buffer(layer.n());
        program_.add("project", engine::project(layer, in, out));
        return out;
    }
    Columns normalised() {
        const Columns out = buffer(kWidth);
        const engine::Norm norm{
            .weight = random({kWidth}, 1.0),
            .group_size = 0,
            .eps = 1e-5f,
            .weight_offset = 0.0f,
            .norm_before_gate = false,
            .sigmoid_gate = false,
        };
        program_.add("normalise", engine::normalise(norm, 1, hidden_, {}, out));
        return out;
    }
    void add_to_stream(Columns result) {
        program_.add("add", engine::combine_two(Combination::add, 1.0f, 1, hidden_, result, hidden_, {}));
    }

    void add_mamba() {
        constexpr Int channels = 48, states = 5, width = 4;
        const Columns in = projected(quantized(2 * channels, kWidth), normalised());
        const Columns x = buffer(channels), y = buffer(channels);
        const engine::Convolution conv{
            .weight = random({width, channels}),
            .bias = random({channels}),
            .channels = channels,
            .width = width,
            .silu = true,
            .state = state({kSequences, width - 1, channels}),
        };
        program_.add("convolve", engine::convolve(conv, part(in, 0, channels), x));
        const Columns steps = projected(dense(channels + 2 * states, channels), x);
        const engine::SelectiveScan scan{
            .a = negative({channels, states}),
            .d = random({channels}),
            .dt_bias = random({channels}),
            .channels = channels,
            .states = states,
            .state = state({kSequences, channels, states}),
        };
        program_.add("scan",
                     engine::selective_scan(scan, x, part(steps, 0, channels), part(steps, channels, states),
                                            part(steps, channels + states, states), part(in, channels, channels), y));
        add_to_stream(projected(dense(kWidth, channels), y));
    }

    void add_mamba2() {
        constexpr Int heads = 3, dim = 7, states = 6, channels = heads * dim;
        const Columns in = projected(dense(2 * channels + 2 * states + heads, kWidth), normalised());
        const Columns y = buffer(channels);
        const engine::HeadScan scan{
            .a = negative({heads}),
            .d = random({heads}),
            .dt_bias = random({heads}),
            .heads = heads,
            .dim = dim,
            .groups = 1,
            .states = states,
            .dt_min = 0.0f,
            .dt_max = 10.0f,
            .state = state({kSequences, heads, dim, states}),
        };
        program_.add("scan", engine::head_scan(scan, part(in, 0, channels), part(in, 2 * (channels + states), heads),
                                               part(in, 2 * channels, states), part(in, 2 * channels + states, states),
                                               part(in, channels, channels), y));
        add_to_stream(projected(dense(kWidth, channels), y));
    }

    void add_attention() {
        constexpr Int heads = 4, groups = 2, dim = 8, places = kPrompt + kTokens;
        const Columns in = projected(dense((heads + 2 * groups) * dim, kWidth), normalised());
        const Columns q = part(in, 0, heads * dim), k = part(in, heads * dim, groups * dim),
                      v = part(in, (heads + groups) * dim, groups * dim), turns = buffer(dim), y = buffer(heads * dim);
        program_.add("angles", engine::angles(random({dim / 2}), dim / 2, 1.0f, DType::f32, turns));
        program_.add("rotate", engine::rotate(heads, turns, q));
        program_.add("rotate", engine::rotate(groups, turns, k));
        const engine::Attention attention{
            .heads = heads,
            .groups = groups,
            .key_dim = dim,
            .value_dim = dim,
            .window = 9,
            .sinks = 2,
            .scale = 0.3f,
            .keys = state({kSequences, groups, places, dim}),
            .values = state({kSequences, groups, places, dim}),
        };
        program_.add("remember", engine::remember(attention.keys, groups, k));
        program_.add("remember", engine::remember(attention.values, groups, v));
        program_.add("attend", engine::attend(attention, q, y));
        add_to_stream(projected(dense(kWidth, heads * dim), y));
    }

    void add_delta_rule() {
        constexpr Int heads = 2, dim = 9, channels = heads * dim;
        const Columns in = projected(dense(3 * channels + 2 * heads, kWidth), normalised()), y = buffer(channels);
        const Columns decay = part(in, 3 * channels, heads);
        program_.add("decay", engine::combine_row(Combination::softplus_gate, negative({heads}), decay, decay));
        const engine::DeltaRule rule{
            .key_heads = heads,
            .heads = heads,
            .key_dim = dim,
            .value_dim = dim,
            .scale = 0.3f,
            .state = state({kSequences, heads, dim, dim}),
        };
        program_.add("rule", engine::delta_rule(rule, part(in, 0, channels), part(in, channels, channels),
                                                part(in, 2 * channels, channels), decay,
                                                part(in, 3 * channels + heads, heads), y));
        add_to_stream(projected(dense(kWidth, channels), y));
    }

    void add_experts() {
        constexpr Int experts = 4, each = 2, inner = 24;
        const Columns in = normalised(), scores = projected(dense(experts, kWidth), in);
        const engine::Routes routes{.index = buffer(each), .experts = experts};
        const Columns weights = buffer(each), gathered = buffer(kWidth, each * kRows),
                      inside = buffer(inner, each * kRows), back = buffer(kWidth, each * kRows), y = buffer(kWidth);
        const engine::Routing routing{
            .bias = random({experts}),
            .sigmoid = false,
            .normalise = true,
            .epsilon = 0.0f,
            .factor = 1.0f,
            .groups = 1,
            .open_groups = 1,
            .rounded_to = DType::f32,
        };
        program_.add("route", engine::route(routing, scores, routes.index, weights));
        program_.add("gather", engine::gather(routes, in, gathered));
        program_.add("up", engine::project_gathered(quantized(experts * inner, kWidth), routes, gathered, inside, {}));
        program_.add("gate", engine::combine_two(Combination::silu_gate, 1.0f, each, inside, inside, inside, {}));
        program_.add("down", engine::project_gathered(dense(experts * kWidth, inner), routes, inside, back, {}));
        program_.add("sum", engine::sum_gathered(routes, weights, back, y));
        add_to_stream(y);
    }

    engine::Program program_;
    std::deque<Tensor> weights_, states_;
    std::deque<std::vector<std::int32_t>> packed_;
    const Columns hidden_ = buffer(kWidth), logits_ = buffer(kVocabulary);
};

}  // namespace

bool check_program() {
    Model model;
    bool is_same = true;
    for_tiers("dequant_matmul", [&](Tier tier) {
        const std::vector<float> alone = model.run(1, tier);
        for (const float logit : alone) is_same = is_same && logit == logit;
        for (const int threads : {2, 3}) is_same = is_same && model.run(threads, tier) == alone;
    });
    return is_same;
}

}  // namespace klfast::test
