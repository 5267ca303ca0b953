// A fuzzer of the kernels without Python, for libFuzzer: the first bytes of an input choose op, tier and threads.
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

#include "calls.h"

namespace klfast::fuzz {
namespace {

constexpr Call* kCalls[] = {
    call_dequant_matmul,
    call_grouped_dequant_matmul,
    call_linear,
    call_dequantize_row,
    call_decode_attention,
    call_logit_divergence,
    call_accumulate,
    call_from_parts,
    call_gathered_logits,
    call_causal_conv1d,
    call_causal_conv1d_update,
    call_selective_scan,
    call_selective_state_update,
    call_mamba_chunk_scan,
    call_gated_delta_rule,
    call_mamba_step,
    call_rms_norm,
    call_combine,
    call_largest,
    call_weighted_sum,
};

// Those that this machine runs.
std::vector<Tier> tiers() {
    std::vector<Tier> found;
    for (std::size_t t = 0; t < kTiers; ++t)
        if (why_not(static_cast<Tier>(t)).empty()) found.push_back(static_cast<Tier>(t));
    return found;
}

}  // namespace

void require(bool is_kept, const char* promise) {
    if (is_kept) return;
    std::fprintf(stderr, "not kept: %s\n", promise);
    std::abort();
}

}  // namespace klfast::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace klfast::fuzz;
    static const std::vector<klfast::Tier> all = tiers();
    Input input(data, size);
    Call* const call = kCalls[input.byte() % std::size(kCalls)];
    const klfast::Tier limit = all[input.byte() % all.size()];
    call(input, {.limit = limit, .n_threads = input.one_of({1, 1, 1, 1, 1, 1, 1, 3})});
    return 0;
}
