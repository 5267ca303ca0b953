// What a fuzzer's bytes decide.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace klfast::fuzz {

using Int = std::int64_t;

class Input {
  public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

    // The next byte; 0 behind the last.
    std::uint8_t byte() {
        if (left_ == 0) return 0;
        --left_;
        return *data_++;
    }

    bool flag() { return byte() % 2 != 0; }

    template <class T>
    T one_of(std::initializer_list<T> choices) {
        return choices.begin()[byte() % choices.size()];
    }

    // From `least` to `most`, mostly small. The product of all sizes is at most kWork, unless the least ones' is
    // larger: so no input takes long.
    Int size(Int most, Int least = 0) {
        const double drawn = static_cast<double>(two_bytes()) / 0xffff, squared = drawn * drawn;
        const Int range = std::max<Int>(std::min(most, work_) - least, 0);
        const Int found = least + static_cast<Int>(static_cast<double>(range) * squared * squared);
        work_ /= std::max<Int>(found, 1);
        return found;
    }

    // From 0 to count - 1.
    Int index(Int count) { return two_bytes() % count; }

  private:
    Int two_bytes() {
        const Int high = byte();
        return high << 8 | byte();
    }

    static constexpr Int kWork = 1 << 14;

    const std::uint8_t* data_;
    std::size_t left_;
    Int work_ = kWork;
};

// Pseudo-random numbers, xorshift32 (Marsaglia 2003).
class Random {
  public:
    explicit Random(std::uint32_t seed) : state_(seed * 2654435769u + 1) {}

    std::uint32_t bits() {
        state_ ^= state_ << 13, state_ ^= state_ >> 17, state_ ^= state_ << 5;
        return state_;
    }

    // From -1 to 1.
    float fraction() { return static_cast<float>(static_cast<std::int32_t>(bits())) * 0x1p-31f; }

  private:
    std::uint32_t state_;
};

}  // namespace klfast::fuzz
