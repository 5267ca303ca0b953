// A model as a flat list of instructions over buffers of its own, which one call runs for one token of some sequences,
// or for a chunk of a prompt.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor_view.h"
#include "core/tiers.h"

namespace klfast::engine {

// The states of some sequences, in the order in which the program numbers them.
using States = std::vector<View>;

// What a run computes: `length` tokens of each of some sequences.
struct Input {
    const std::int64_t* tokens;  // [sequences, length]
    const std::int64_t* seen;    // [sequences]: tokens before these
    std::int64_t sequences, length;
    const States& states;  // of these sequences; written in place
    int n_threads;
    Tier limit;
    bool each_token = false;  // the head takes all tokens, not only each sequence's last

    std::int64_t rows() const { return sequences * length; }
};

// Columns first .. first + width of a buffer, in which each token has a row.
struct Columns {
    int buffer;
    std::int64_t first, width;
};

// The memory of a program's intermediate results.
class Buffers {
  public:
    int add(std::int64_t width, DType type, std::int64_t rows);
    // [rows, width]; std::out_of_range where the buffer ends sooner.
    View operator[](const Columns& columns) const;
    // The same as [sequences, length, width].
    View by_sequence(const Columns& columns, std::int64_t length) const;
    // The same as [sequences, length, heads, width of a head].
    View by_head(const Columns& columns, std::int64_t length, std::int64_t heads) const;
    std::int64_t bytes() const;
    std::int64_t bytes(int buffer) const;

  private:
    struct Free {
        void operator()(std::byte* memory) const;
    };
    struct One {
        std::unique_ptr<std::byte[], Free> memory;
        std::int64_t width, rows;
        DType type;
    };
    std::vector<One> all_;
};

using Work = std::function<void(const Input&, const Buffers&)>;

struct Instruction {
    std::string name;
    Work work;
};

class Program {
  public:
    void add(std::string name, Work work) { instructions_.push_back({std::move(name), std::move(work)}); }

    // Runs all instructions. Few rows: threads stay together from the first to the last (core/team.h).
    void run(const Input& input) const;

    // The same, one after another; returns the seconds that each took.
    std::vector<double> profile(const Input& input) const;

    const std::vector<Instruction>& instructions() const { return instructions_; }

    Buffers buffers;
    std::int64_t vocabulary = 0;  // tokens are below

  private:
    std::vector<Instruction> instructions_;
};

}  // namespace klfast::engine
