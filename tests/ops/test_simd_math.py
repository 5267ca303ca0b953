"""The elementary functions of csrc/simd/math.h at every tier, through ops that expose them."""

import math

import torch

from klfast import ops


def ulps(actual, expected):
    """Return the error in units in the last place of a float32 result."""
    exponent = torch.frexp(expected.abs().clamp_min(2.0**-126)).exponent.double()
    return ((actual.double() - expected).abs() / torch.exp2(exponent - 24)).max()


def line(low, high, count=40_001):
    return torch.linspace(low, high, count)


def decay(rate):
    """Return e^rate as the state update computes it: state 1, dt 1, A = rate."""
    state = torch.ones(1, rate.numel(), 1)
    one, zero = torch.ones(1, rate.numel()), torch.zeros(1, 1)
    ops.selective_state_update(state, one, one, rate[:, None], zero, zero)
    return state.flatten()


def test_exp_is_within_2_ulp(tier):
    for x in (line(-87.3, 88.3), line(-1, 1), torch.tensor([0.0, -1e-7, -1e-30])):
        assert ulps(decay(x), torch.exp(x.double())) < 2
    assert torch.equal(decay(torch.tensor([0.0, -math.inf, -200.0, math.inf])), torch.tensor([1.0, 0.0, 0.0, math.inf]))
    assert decay(torch.tensor([math.nan])).isnan().all()


def test_scan_decay_is_within_its_absolute_bound(tier):
    """exp(dt A) in the scan: absolute error below 2^-22 for dt A <= 0."""
    x = -torch.logspace(-8, 2, 4001)
    ones = torch.ones(1, x.numel(), 2)
    u = ones * torch.tensor([1.0, 0.0])
    _, state = ops.selective_scan_fn(
        u, ones, x[:, None], torch.ones(1, 1, 2), torch.ones(1, 1, 2), return_last_state=True
    )
    assert (state.flatten().double() - torch.exp(x.double())).abs().max() < 2**-22


def test_softplus_and_silu(tier):
    x = line(-80, 80)
    ones = torch.ones(1, x.numel(), 1)
    zero_rate, b = torch.zeros(x.numel(), 1), torch.ones(1, 1, 1)
    softplus = ops.selective_scan_fn(ones, x[None, :, None], zero_rate, b, b, delta_softplus=True).flatten()
    assert ulps(softplus, torch.log1p(torch.exp(-x.double().abs())) + x.double().clamp_min(0)) < 4
    silu = ops.causal_conv1d_fn(x[None, :, None], torch.ones(x.numel(), 1), activation="silu").flatten()
    assert ulps(silu, x.double() / (1 + torch.exp(-x.double()))) < 6
