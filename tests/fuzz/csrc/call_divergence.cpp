#include <cmath>
#include <memory>
#include <vector>

#include "calls.h"
#include "divergence/divergence.h"
#include "divergence/gathered/gathered_logits.h"
#include "operand.h"

namespace klfast::fuzz {
namespace {

using divergence::Matrix, divergence::State;

constexpr Int kMetrics = 8;

Matrix matrix(const Operand& logits) {
    const View view = logits.view();
    return {.data = view.data, .dtype = view.dtype, .row_stride = view.stride[0], .column_stride = view.stride[1]};
}

// A part of a matrix.
Matrix from(Matrix whole, Int row, Int column) {
    const Int elements = row * whole.row_stride + column * whole.column_stride;
    whole.data = static_cast<const std::byte*>(whole.data) + elements * size_of(whole.dtype);
    return whole;
}

std::vector<Int> draw_targets(Input& input, Int tokens, Int vocab) {
    std::vector<Int> targets(tokens);
    for (Int& target : targets) target = input.flag() ? input.index(vocab) : input.one_of<Int>({-100, vocab - 1});
    return targets;
}

// What is promised of the metrics [8, tokens] of a token without a fault, and of its fault.
void check(const float* out, Int tokens, Int token, Int vocab, divergence::Fault fault) {
    require(std::abs(fault) <= 2 * vocab, "a fault names a logit");
    if (fault != 0) return;
    for (const Int metric : {0, 1, 2, 3})
        require(out[metric * tokens + token] >= 0, "no divergence is negative or a NaN");
    require(out[2 * tokens + token] <= 0.6932f, "a Jensen-Shannon divergence is at most log 2");
}

}  // namespace

void call_logit_divergence(Input& input, How how) {
    const Int vocab = input.size(5000, 1), tokens = input.size(6);
    const Operand teacher = Operand::read(input, {tokens, vocab}), student = Operand::read(input, {tokens, vocab});
    const std::vector<Int> targets = draw_targets(input, tokens, vocab);
    std::vector<float> out(kMetrics * tokens);
    std::vector<divergence::Fault> fault(tokens);
    divergence::logit_divergence(
        {
            .teacher = matrix(teacher),
            .student = matrix(student),
            .tokens = tokens,
            .columns = vocab,
            .first_column = 0,
            .targets = input.flag() ? targets.data() : nullptr,
            .states = nullptr,
            .n_threads = how.n_threads,
        },
        out.data(), fault.data(), how.limit);
    for (Int token = 0; token < tokens; ++token) check(out.data(), tokens, token, vocab, fault[token]);
}

// The same by blocks of columns. Tokens that need their whole row again then have it, one at a time.
void call_accumulate(Input& input, How how) {
    const Int vocab = input.size(5000, 1), tokens = input.size(6), block = 1 + vocab / (1 + input.index(9));
    const Operand teacher = Operand::read(input, {tokens, vocab}), student = Operand::read(input, {tokens, vocab});
    const std::vector<Int> targets = draw_targets(input, tokens, vocab);
    const bool with_targets = input.flag();
    std::vector<State> states(tokens);
    const auto accumulate_rows = [&](Int first, Int count) {
        for (Int column = 0; column < vocab; column += block)
            divergence::accumulate(
                {
                    .teacher = from(matrix(teacher), first, column),
                    .student = from(matrix(student), first, column),
                    .tokens = count,
                    .columns = std::min(block, vocab - column),
                    .first_column = column,
                    .targets = with_targets ? targets.data() + first : nullptr,
                    .states = states.data() + first,
                    .n_threads = how.n_threads,
                },
                how.limit);
    };
    if (tokens > 0) accumulate_rows(0, tokens);
    std::vector<float> out(kMetrics);
    for (Int token = 0; token < tokens; ++token) {
        divergence::Fault fault = 0;
        for (bool again = false;;) {
            divergence::finish(&states[token], 1, vocab, out.data(), &fault, &again);
            if (!again) break;
            accumulate_rows(token, 1);
        }
        check(out.data(), 1, 0, vocab, fault);
    }
}

void call_from_parts(Input& input, How how) {
    using divergence::Part, divergence::PartIndex, divergence::Verdict;
    const Int tokens = input.size(20), n_parts = input.size(8, 1), vocab = input.size(5000, 1);
    std::vector<Part> parts(tokens * n_parts);
    fill(input, parts.data(), tokens * n_parts * static_cast<Int>(sizeof(Part) / sizeof(float)), DType::f32);
    std::vector<PartIndex> index(tokens * n_parts);
    for (PartIndex& one : index)
        one = {.argmax_a = static_cast<std::int32_t>(input.index(vocab)),
               .argmax_b = static_cast<std::int32_t>(input.index(vocab))};
    std::vector<float> anchor(tokens), out(kMetrics * tokens);
    fill(input, anchor.data(), tokens, DType::f32);
    std::vector<double> targets(2 * tokens);
    for (double& logit : targets) logit = input.one_of({0.5, -3.0, 1e30, static_cast<double>(NAN)});
    std::vector<Int> runs(tokens);
    for (Int& count : runs) count = input.index(5);
    std::vector<Verdict> verdict(tokens);
    divergence::from_parts(
        {
            .parts = parts.data(),
            .index = index.data(),
            .tokens = tokens,
            .n_parts = n_parts,
            .vocab = vocab,
            .targets = input.flag() ? targets.data() : nullptr,
            .anchor = anchor.data(),
            .runs = runs.data(),
            .n_threads = how.n_threads,
        },
        out.data(), verdict.data());
}

void call_gathered_logits(Input& input, How how) {
    const Int features = input.size(300), entries = input.size(40), students = input.size(8), tokens = input.size(5),
              vocab = input.size(50, 1);
    const Operand hidden = Operand::read(input, {students, tokens, features}),
                  head = Operand::read(input, {vocab, features});
    std::vector<Int> index(tokens * entries);
    Random random(input.byte());
    for (Int& row : index) row = random.bits() % vocab;
    std::vector<float> out(students * tokens * entries);
    gathered_logits(
        {
            .hidden = hidden.view(),
            .head = head.view(),
            .index = index.data(),
            .out = out.data(),
            .students = students,
            .tokens = tokens,
            .entries = entries,
            .features = features,
            .n_threads = how.n_threads,
        },
        how.limit);
}

}  // namespace klfast::fuzz
