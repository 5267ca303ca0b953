#include "check.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <random>
#include <utility>

#include "core/kernel_table.h"
#include "core/team.h"

namespace klfast::test {
namespace {

std::mt19937& generator() {
    thread_local std::mt19937 generator(1);
    return generator;
}

// The worst error of an op's results at a tier, in units of the tolerance.
struct Worst {
    int cases = 0;
    double error = 0;
};

std::map<std::pair<std::string, Tier>, Worst>& worst() {
    thread_local std::map<std::pair<std::string, Tier>, Worst> all;
    return all;
}

thread_local bool in_team = false;

// The error of float32 sums for float32 results; else half a unit in the last place, plus some of that error.
double allowed(DType dtype) { return dtype == DType::f32 ? 2e-5 : dtype == DType::bf16 ? 0x1.1p-8 : 0x1.1p-11; }

}  // namespace

Tensor::Tensor(DType dtype, std::vector<Int> shape) : dtype_(dtype), shape_(std::move(shape)), size_(1) {
    for (const Int n : shape_) size_ *= n;
    memory_.resize(size_ * size_of(dtype));
    for (Int i = 0; i < size_; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
}

Tensor Tensor::random(DType dtype, std::vector<Int> shape, double scale) {
    Tensor made(dtype, std::move(shape));
    for (Int i = 0; i < made.size_; ++i) made.set(i, scale * random_normal());
    return made;
}

View Tensor::view() {
    View view{.data = memory_.data(), .dtype = dtype_, .stride = {0, 0, 0, 0}};
    Int stride = 1;
    for (std::size_t i = shape_.size(); i-- > 0; stride *= shape_[i]) view.stride[i] = stride;
    return view;
}

double random_normal() { return std::normal_distribution<double>()(generator()); }

Int random_int(Int begin, Int end) { return std::uniform_int_distribution<Int>(begin, end - 1)(generator()); }

double silu(double x) { return x / (1 + std::exp(-x)); }

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

std::set<std::string>& only_tiers() {
    static std::set<std::string> tiers;
    return tiers;
}

void for_tiers(const std::string& op, const std::function<void(Tier)>& each) {
    const TierSet& tiers = op_tiers().at(op);
    for (std::size_t t = 0; t < kTiers; ++t)
        if (tiers[t] && (only_tiers().empty() || only_tiers().contains(kTierNames[t])) &&
            why_not(static_cast<Tier>(t)).empty())
            each(static_cast<Tier>(t));
}

void call(const std::function<void()>& op) { in_team ? run_together(kThreads, op) : op(); }

void use_team() { in_team = true; }

void compare(const std::string& op, Tier tier, const Tensor& got, const std::vector<double>& truth) {
    Worst& found = worst()[{op, tier}];
    ++found.cases;
    double largest = std::numeric_limits<double>::min(), error = 0;
    for (const double value : truth)
        if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
    for (Int i = 0; i < got.size(); ++i) {
        const double off = got[i] == truth[i] ? 0 : std::abs(got[i] - truth[i]);
        error = off <= error ? error : off;  // keeps a NaN
        if (std::isnan(off)) error = std::numeric_limits<double>::infinity();
    }
    found.error = std::max(found.error, error / largest / allowed(got.dtype()));
}

bool report() {
    bool good = !worst().empty();
    for (const auto& [key, found] : worst()) {
        const char* const tier = kTierNames[static_cast<int>(key.second)];
        std::printf("%s %s: %d cases, worst error %.2f of the tolerance\n", key.first.c_str(), tier, found.cases,
                    found.error);
        good = good && found.error <= 1;
    }
    return good;
}

}  // namespace klfast::test
