"""Extreme sizes of ops: none, beyond 32 bits, beyond the memory. Each in its own process."""

import other_process
import pytest
import torch
from test_attention import truth

from klfast import ops, using
from klfast.dispatch import pins

BEGIN = """
import torch
from klfast import ops, using
from klfast.dispatch import pins
"""


def test_out_of_memory_in_a_parallel_region_is_a_memory_error():
    """Kernels allocate scratch in each thread; an exception that escapes a thread would end the process."""
    other_process.run(
        BEGIN
        + """
import resource
torch.set_num_threads(2)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
wide = torch.zeros(1, 1, 1, 1)
calls = {
    "conv": lambda: ops.causal_conv1d_fn(torch.zeros(1, 512, 64), wide[0, 0].expand(512, 1 << 24)),
    "states": lambda: ops.mamba_chunk_scan_combined(
        torch.zeros(2, 70, 2, 16), torch.zeros(2, 70, 2), torch.zeros(2), *[wide.expand(2, 70, 1, 1 << 27)] * 2, 64
    ),
}
for tier in pins.available_tiers():
    for name, call in calls.items():
        with using(tier):
            try:
                call()
            except MemoryError:
                continue
            raise AssertionError(f"{name} at {tier} found the memory")
x = torch.randn(1, 512, 64)
assert torch.equal(ops.causal_conv1d_fn(x, torch.ones(512, 1)), x)
"""
    )


@pytest.mark.slow
def test_rms_norm_of_more_channels_than_32_bits_count():
    """With groups of one, each a vector of floats."""
    other_process.run(
        BEGIN
        + """
channels = (1 << 27) + 16
x = torch.full((1, 1), 3.0, dtype=torch.bfloat16).expand(1, channels)
y = ops.rms_norm(x, torch.full((1,), 2.0, dtype=torch.bfloat16).expand(channels), eps=0.0, group_size=1)
assert y.shape == (1, channels) and (y == 2).all()
"""
    )


def test_state_update_without_states():
    other_process.run(
        BEGIN
        + """
for tier in ["reference", *pins.available_tiers()]:
    for rate in (torch.zeros(1, 1, 1).expand(3, 5, 0), torch.zeros(3, 5, 0)):
        with using(tier):
            x, d, nothing = torch.randn(2, 3, 5), torch.randn(3, 5), torch.zeros(2, 1, 0)
            y = ops.selective_state_update(torch.zeros(2, 3, 5, 0), x, x, rate, nothing, nothing, d)
            assert torch.equal(y, d * x), tier
"""
    )


@pytest.mark.parametrize("keys", [65_537, 200_000])
def test_attention_to_many_keys_in_parts(keys, tier):
    q, k, v = torch.randn(1, 3, 8), torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 5)
    k[0, 0, -1] = 3 * q[0, 1]  # the highest score comes last for one head, which makes the others small
    torch.testing.assert_close(ops.decode_attention(q, k, v, 1.0).double(), truth(q, k, v, 1.0), rtol=1e-4, atol=1e-5)
    k[0, 0, : keys // 2] = -torch.inf
    q = q.abs()
    torch.testing.assert_close(ops.decode_attention(q, k, v, 1.0).double(), truth(q, k, v, 1.0), rtol=1e-4, atol=1e-5)
    k[:] = -torch.inf
    assert ops.decode_attention(q, k, v, 1.0).isnan().all()


@pytest.mark.parametrize("isa", pins.available_tiers())
def test_attention_to_more_keys_than_a_float_counts(isa):
    """Weights and values are summed in parts: one by one, the sums would stop at 2^24."""
    keys = 1 << 26
    q, k, v = (
        torch.ones(1, 1, 1),
        torch.full((1, 1, 1, 1), 0.5).expand(1, 1, keys, 1),
        torch.full((1, 1, 1, 1), 3.0).expand(1, 1, keys, 1),
    )
    with using(isa):
        torch.testing.assert_close(ops.decode_attention(q, k, v, 1.0), torch.full((1, 1, 1), 3.0))


def test_the_extension_and_python_agree_on_few_rows_and_on_no_pin():
    from klfast import _C
    from klfast.backends import operands

    assert _C.few_rows == operands.FEW_ROWS
    assert pins.cpu_tier_limit() == _C.any_tier or pins.pinned() in pins.CPU_TIERS
