"""Triton's state-space kernels against a float64 recurrence: the CPU kernels' cases, on the device."""

import math

import pytest
import test_ssm_ops as cases
import torch
from klfast.kernels import ssd_scan
from klfast.kernels.ssm_common import NO_LIMIT
from test_ssm_ops import (  # noqa: F401
    _poison,
    test_conv_update_continues_a_sequence,
    test_scan_takes_one_group_and_constants,
    test_state_update_without_heads,
)


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    if device.type == "cpu":  # the interpreter truncates bfloat16 instead of rounding
        monkeypatch.setitem(cases.TOLERANCE, torch.bfloat16, 2 * cases.TOLERANCE[torch.bfloat16])
    with device:
        yield


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 2), (3, 48, 63), (1, 130, 17), (0, 5, 3)])
def test_conv(shape, width):
    cases.test_conv(*shape, width, "triton")


@pytest.mark.parametrize(
    ("shape", "states"), [((1, 1, 1, 1), 1), ((2, 5, 2, 5), 3), ((1, 48, 33, 3), 16), ((1, 100, 20, 1), 128)]
)
def test_scan(shape, states):
    cases.test_scan(*shape, states, "triton")


@pytest.mark.parametrize("lengths", [[33, 0, 1, 66]], ids=str)
def test_scan_in_pieces(lengths):
    cases.test_scan_in_pieces(lengths, "triton")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 4, 5, 2, 3), (1, 3, 64, 1, 128)])
def test_state_update(shape, state_dtype):
    cases.test_state_update(*shape, state_dtype, "triton")


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 2, 4, 5, 2, 3), (1, 33, 2, 16, 1, 16), (1, 5, 2, 64, 1, 128), (1, 0, 2, 4, 1, 4)]
)
def test_chunk_scan(shape, monkeypatch):
    monkeypatch.setattr(ssd_scan, "is_for", lambda *_: False)  # step by step
    cases.test_chunk_scan(*shape, "triton")


@pytest.mark.parametrize("shape", [(2, 70, 2, 16, 2, 32), (1, 70, 1, 64, 1, 128), (1, 16, 2, 128, 2, 16)])
def test_chunk_scan_in_chunks(shape, family):
    """Values in two bfloat16 parts lose more in the interpreter, which truncates instead of rounding."""
    variants = [(True, torch.bfloat16), (False, torch.float16)]
    assert all(
        ssd_scan.is_for(torch.empty(1, *shape[1:4], dtype=dtype), *[torch.empty(1, 1, 1, shape[5], dtype=dtype)] * 2)
        for _, dtype in variants
    )
    cases.check_chunk_scan(*shape, variants, factor=12)


def test_chunks_after_steps_that_forget_everything():
    """Steps so long that the sum of their logarithms would leave no digits for later ones."""
    x, b = torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    dt = torch.full((1, 40, 1), 0.125)
    dt[:, ::9] = 1e6
    operands = [t.bfloat16() for t in (x, dt, -torch.ones(1), b, b)]
    found = cases.ops.mamba_chunk_scan_combined(*operands, 64)
    cases.close(found, cases.ops.mamba_chunk_scan_combined(*(t.float() for t in operands), 64).double(), torch.bfloat16)


def in_chunks(x, dt, a, b, c, family):
    """Return (y, the last state) by the chunk kernels, both in float32."""
    y, last = torch.empty(x.shape), torch.empty(*x.shape[::2], x.shape[3], b.shape[3])
    plain = dict(d=None, bias=None, z=None, first=None, softplus=False, dt_limit=NO_LIMIT)
    for launch in ssd_scan.plan(x=x, dt=dt, a=a, b=b, c=c, last=last, y=y, family=family, **plain):
        launch.run()
    return y, last


def operands_of_chunks(length, heads=2, channels=16, states=16):
    x, b, c = (
        torch.randn(1, length, heads, channels),
        torch.randn(1, length, 1, states),
        torch.randn(1, length, 1, states),
    )
    return x.half(), torch.rand(1, length, heads) / 8, -torch.rand(heads) - 1, b.half(), c.half()


def test_chunks_keep_the_digits_of_short_steps_among_long_ones(family):
    x, dt, _, b, c = operands_of_chunks(96)
    a, is_short = torch.full((2,), -16.0), torch.arange(96) % 32 >= 26
    dt[:, ~is_short] = 6.5
    y, last = in_chunks(x, dt, a, b, c, family)
    flat = lambda t: t.permute(0, 2, 3, 1).reshape(1, 32, 96)  # noqa: E731
    rate = a.repeat_interleave(16)[:, None].expand(-1, 16)
    true, state = cases.true_scan(
        flat(x),
        flat(dt[..., None].expand(x.shape)),
        rate,
        b.permute(0, 2, 3, 1),
        c.permute(0, 2, 3, 1),
        None,
        None,
        None,
        False,
    )
    # Values in two bfloat16 parts lose 3e-5.
    assert (last.double() - state.view(last.shape)).abs().max() <= 6e-5 * state.abs().max()
    true = true.view(1, 2, 16, 96).permute(0, 3, 1, 2)
    errors, sizes = (t[:, is_short].abs().amax((0, 2, 3)) for t in (y.double() - true, true))  # of each step
    assert (errors <= 6e-5 * sizes).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_do_not_affect_earlier_steps_of_a_chunk(value, family):
    operands = operands_of_chunks(70)
    clean, _ = in_chunks(*operands, family)
    for i, name in ((1, "dt"), (3, "B"), (4, "C")):
        bad = list(operands)
        bad[i] = operands[i].clone()
        bad[i][:, 40] = value
        y, last = in_chunks(*bad, family)
        assert torch.equal(y[:, :40], clean[:, :40]), name
        assert not y[:, 40].isfinite().any(), name
        assert last.isfinite().any() == (name == "C"), name


def test_softplus_and_silu():
    """Over their whole range, to a few units in the last place of the exponent."""
    x = torch.linspace(-80, 80, 501)
    ones, b = torch.ones(1, x.numel(), 1), torch.ones(1, 1, 1)
    true, rtol = x.double(), 2e-7 * (4 + x.double().abs())

    def check(found, expected):
        assert ((found.flatten().double() - expected).abs() <= rtol * expected.abs() + 1e-37).all()

    check(
        cases.ops.selective_scan_fn(ones, x[None, :, None], torch.zeros(x.numel(), 1), b, b, delta_softplus=True),
        torch.log1p(torch.exp(-true.abs())) + true.clamp_min(0),
    )
    check(
        cases.ops.causal_conv1d_fn(x[None, :, None], torch.ones(x.numel(), 1), activation="silu"),
        true / (1 + torch.exp(-true)),
    )
