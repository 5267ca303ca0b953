// Random tensors for kernels, and comparison of their results with the truth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/tensor_view.h"
#include "core/tiers.h"

namespace klfast::test {

using Int = std::int64_t;

inline constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};
inline constexpr int kThreads = 2;

// A contiguous tensor.
class Tensor {
  public:
    // Filled with NaN, which a kernel must overwrite.
    Tensor(DType dtype, std::vector<Int> shape);

    static Tensor random(DType dtype, std::vector<Int> shape, double scale = 1.0);

    Int size() const { return size_; }
    DType dtype() const { return dtype_; }
    double operator[](Int i) const { return load_float(memory_.data(), i, dtype_); }
    void set(Int i, double value) { store_float(memory_.data(), i, dtype_, static_cast<float>(value)); }
    void* data() { return memory_.data(); }
    View view();

  private:
    DType dtype_;
    std::vector<Int> shape_;
    Int size_;
    std::vector<std::byte> memory_;
};

double random_normal();
Int random_int(Int begin, Int end);

// The tiers to check; all where there are none.
std::set<std::string>& only_tiers();

// Calls each(tier) for those of these tiers that an op has kernels for and this machine can run.
void for_tiers(const std::string& op, const std::function<void(Tier)>& each);

// Calls an op that the engine has, too: from one thread or, after use_team() in the calling thread, as the engine does,
// from a team of kThreads (core/team.h).
void call(const std::function<void()>& op);
void use_team();

// Records a result's error, relative to the largest true value and to its dtype's tolerance.
void compare(const std::string& op, Tier tier, const Tensor& got, const std::vector<double>& truth);

// Prints a line for each op and tier that the calling thread has checked; returns true if all results were within
// tolerance.
bool report();

double silu(double x);
double softplus(double x);

// Each checks one family of ops.
void check_quantized_matmul();
void check_dense_matmul();
void check_attention();
void check_divergence();
void check_gathered_logits();
void check_conv();
void check_scan();
void check_delta();
void check_norm();
void check_elementwise();

}  // namespace klfast::test
