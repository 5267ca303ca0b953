// Memory for the length of a call. Local to the including translation unit, for its flags are its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace klfast {
namespace {

// `size` elements, aligned to a cache line, not initialised; std::bad_alloc where there is no such memory.
template <class T>
struct Buffer {
    T* data;
    explicit Buffer(std::int64_t size) : data(static_cast<T*>(::operator new(bytes(size), std::align_val_t{64}))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T& operator[](std::int64_t i) const { return data[i]; }

  private:
    // A size that overflowed is negative.
    static std::size_t bytes(std::int64_t size) {
        if (size < 0 || size >= INT64_MAX / static_cast<std::int64_t>(sizeof(T))) throw std::bad_alloc();
        return (static_cast<std::size_t>(size) + 1) * sizeof(T);
    }
};

}  // namespace
}  // namespace klfast
