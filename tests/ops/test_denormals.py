"""Numbers below float32's normal ones (1.2e-38) count as 0 in kernels; for the caller they stay what they are."""

import pytest
import torch

import klfast
from klfast import ops
from klfast.dispatch import pins

FADED = 1e-37  # a state that one step takes below


def scan(dim):
    u, delta, B = torch.zeros(1, dim, 4), torch.ones(1, dim, 4), torch.zeros(1, 16, 4)
    A, initial = -torch.ones(dim, 16), torch.full((1, dim, 16), FADED)
    return ops.selective_scan_fn(u, delta, A, B, B, return_last_state=True, initial_states=initial)[1]


def chunk_scan(heads):
    x, dt, B = torch.zeros(1, 4, heads, 8), torch.ones(1, 4, heads), torch.zeros(1, 4, 1, 16)
    initial = torch.full((1, heads, 8, 16), FADED)
    return ops.mamba_chunk_scan_combined(
        x, dt, -torch.ones(heads), B, B, 256, initial_states=initial, return_final_states=True
    )[1]


def steps(dim):
    state, x, B = torch.full((1, dim, 16), FADED), torch.zeros(1, dim), torch.zeros(1, 16)
    for _ in range(4):
        ops.selective_state_update(state, x, torch.ones(1, dim), -torch.ones(dim, 16), B, B)
    return state


def delta_rule(heads):
    q, g = torch.zeros(1, 4, heads, 8), -torch.ones(1, 4, heads)
    initial = torch.full((1, heads, 8, 8), FADED)
    return ops.chunk_gated_delta_rule(
        q, q, q, g, torch.ones(1, 4, heads), initial_state=initial, output_final_state=True
    )[1]


@pytest.mark.parametrize("size", [1, 3000])  # one thread, several
@pytest.mark.parametrize("recurrence", [scan, chunk_scan, steps, delta_rule])
@pytest.mark.parametrize("tier", pins.available_tiers())
def test_faded_states_end_at_zero(recurrence, size, tier):
    with klfast.using(tier):
        assert not recurrence(size).any()
    assert (torch.tensor([1e-38, 1.0]) * 0.1)[0] > 0
