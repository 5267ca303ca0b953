#include "engine/program.h"

#include <chrono>
#include <new>
#include <stdexcept>
#include <string>

#include "core/team.h"

namespace klfast::engine {
namespace {

// From there on, an instruction's work is long beside waking the threads for it, and its own threads share scratch.
constexpr std::int64_t kFewRows = 16;

}  // namespace

void Buffers::Free::operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{64}); }

int Buffers::add(std::int64_t width, DType type, std::int64_t rows) {
    const auto bytes = static_cast<std::size_t>(rows * width * size_of(type));
    auto* const memory = static_cast<std::byte*>(::operator new[](bytes + 64, std::align_val_t{64}));
    all_.push_back({.memory = std::unique_ptr<std::byte[], Free>(memory), .width = width, .rows = rows, .type = type});
    return static_cast<int>(all_.size()) - 1;
}

View Buffers::operator[](const Columns& columns) const {
    const One& buffer = all_.at(columns.buffer);
    if (columns.first < 0 || columns.width < 0 || columns.first > buffer.width - columns.width)
        throw std::out_of_range("a buffer of " + std::to_string(buffer.width) + " columns has no " +
                                std::to_string(columns.width) + " from " + std::to_string(columns.first) + " on");
    return {
        .data = buffer.memory.get() + columns.first * size_of(buffer.type),
        .dtype = buffer.type,
        .stride = {buffer.width, 1},
    };
}

View Buffers::by_sequence(const Columns& columns, std::int64_t length) const {
    View view = (*this)[columns];
    view.stride[2] = 1, view.stride[1] = view.stride[0], view.stride[0] *= length;
    return view;
}

View Buffers::by_head(const Columns& columns, std::int64_t length, std::int64_t heads) const {
    View view = by_sequence(columns, length);
    view.stride[2] = columns.width / heads, view.stride[3] = 1;
    return view;
}

std::int64_t Buffers::bytes() const {
    std::int64_t total = 0;
    for (int buffer = 0; buffer < static_cast<int>(all_.size()); ++buffer) total += bytes(buffer);
    return total;
}

std::int64_t Buffers::bytes(int buffer) const {
    const One& one = all_[buffer];
    return one.rows * one.width * size_of(one.type);
}

void Program::run(const Input& input) const {
    const auto all = [&] {
        for (const Instruction& instruction : instructions_) instruction.work(input, buffers);
    };
    if (input.rows() <= kFewRows)
        run_together(input.n_threads, all);
    else
        all();
}

std::vector<double> Program::profile(const Input& input) const {
    using Clock = std::chrono::steady_clock;
    std::vector<double> seconds;
    const auto all = [&](bool first) {
        for (const Instruction& instruction : instructions_) {
            const Clock::time_point begin = Clock::now();
            instruction.work(input, buffers);
            if (first) seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
        }
    };
    if (input.rows() <= kFewRows)
        run_together(input.n_threads, [&] { all(membership().rank == 0); });
    else
        all(true);
    return seconds;
}

}  // namespace klfast::engine
