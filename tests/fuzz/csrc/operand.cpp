#include "operand.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

namespace klfast::fuzz {
namespace {

float special(Random& random) {
    using Limits = std::numeric_limits<float>;
    constexpr float kValues[] = {
        0.0f,
        -0.0f,
        1e-41f,
        1e4f,
        -1e9f,
        1e30f,
        88.8f,
        -104.0f,
        Limits::max(),
        Limits::lowest(),
        Limits::infinity(),
        -Limits::infinity(),
        Limits::quiet_NaN(),
    };
    return kValues[random.bits() % std::size(kValues)];
}

}  // namespace

void fill(Input& input, void* data, Int count, DType dtype) {
    enum Kind { kFractions, kIntegers, kSomeSpecial, kBits };
    const Kind kind = input.one_of({kFractions, kFractions, kIntegers, kSomeSpecial, kBits});
    const float scale = input.one_of({1.0f, 1e-4f, 0.1f, 10.0f, 1e3f, 1e30f});
    Random random(input.byte());
    const auto value = [&] {
        if (kind == kIntegers) return static_cast<float>(random.bits() % 7) - 3.0f;
        if (kind == kSomeSpecial && random.bits() % 16 == 0) return special(random);
        if (kind == kBits) return std::bit_cast<float>(random.bits());
        return scale * random.fraction();
    };
    constexpr Int kFresh = 509;  // the rest repeats these, which is quicker
    const Int fresh = std::min(count, kFresh);
    for (Int i = 0; i < fresh; ++i) store_float(data, i, dtype, value());
    auto* const bytes = static_cast<std::byte*>(data);
    for (Int i = fresh; i < count; i += fresh)
        std::memcpy(bytes + i * size_of(dtype), bytes, std::min(fresh, count - i) * size_of(dtype));
}

Operand::Operand(Input& input, const Shape& shape, DType dtype, Strides strides, bool may_repeat)
    : view_{.dtype = dtype} {
    const Int count = draw_strides(input, shape, strides, may_repeat);
    if (count == 0) return;
    const Int first = input.byte() % 4;  // elements before it, so that it may lie at any address
    memory_.reset(new std::byte[(first + count) * size_of(dtype)]);
    view_.data = memory_.get() + first * size_of(dtype);
    fill(input, view_.data, count, dtype);
}

// Returns how many elements lie between the first and the end of the last; 0 without elements.
Int Operand::draw_strides(Input& input, const Shape& shape, Strides strides, bool may_repeat) {
    std::vector<std::size_t> order(shape.size());  // the innermost dimension first
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = order.size() - 1 - i;
    if (strides == Strides::any)
        for (std::size_t i = 0; i + 1 < order.size(); ++i)
            std::swap(order[i], order[i + input.byte() % (order.size() - i)]);
    Int stride = 1, last = 0;
    bool is_empty = false;
    for (const std::size_t dimension : order) {
        const Int size = shape[dimension];
        const bool is_fixed = strides == Strides::dense || (strides == Strides::rows && dimension + 1 == shape.size());
        const std::uint8_t how = is_fixed ? 0 : input.byte();
        const bool repeats = may_repeat && how % 8 == 7;
        if (how % 8 == 6) stride += how / 8 % 3;
        view_.stride[dimension] = repeats ? 0 : stride;
        last += view_.stride[dimension] * (size - 1);
        is_empty = is_empty || size == 0;
        if (!repeats) stride *= size == 0 ? 1 : size;
    }
    return is_empty ? 0 : last + 1;
}

}  // namespace klfast::fuzz
