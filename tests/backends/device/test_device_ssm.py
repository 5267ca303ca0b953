"""Triton's state-space kernels against a float64 recurrence: the CPU kernels' cases, on the device."""

import math

import pytest
import ssm_truth
import test_ssm_conv as conv
import test_ssm_scan as scan
import torch
from klfast.kernels import ssd_scan
from klfast.kernels.ssm_common import NO_LIMIT
from test_ssm_conv import _poison, test_a_ring_keeps_what_is_older, test_conv_update_continues_a_sequence  # noqa: F401
from test_ssm_scan import test_state_update_of_a_cache_without_heads, test_state_update_without_heads  # noqa: F401

from klfast import ops
from klfast.dispatch import pins


@pytest.fixture
def tier():
    return "triton"


@pytest.fixture(autouse=True)
def _on_the_device(device, monkeypatch):
    if device.type == "cpu":  # the interpreter truncates bfloat16 instead of rounding
        monkeypatch.setitem(ssm_truth.TOLERANCE, torch.bfloat16, 2 * ssm_truth.TOLERANCE[torch.bfloat16])
        monkeypatch.setattr(scan, "FACTOR_OF_STATES", 12)  # values in two bfloat16 parts lose more, too
    with device:
        yield


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 2), (3, 48, 63), (1, 130, 17), (0, 5, 3)])
def test_conv(shape, width):
    conv.test_conv(*shape, width, "triton")


@pytest.mark.parametrize(
    ("shape", "states"), [((1, 1, 1, 1), 1), ((2, 5, 2, 5), 3), ((1, 48, 33, 3), 16), ((1, 100, 20, 1), 128)]
)
def test_scan(shape, states):
    scan.test_scan(*shape, states, "triton")


@pytest.mark.parametrize(("B_kind", "C_kind"), [("groups", "constant"), ("constant", "one"), ("constant", "constant")])
def test_scan_takes_any_kinds_of_B_and_C(B_kind, C_kind):  # noqa: N802
    scan.test_scan_takes_any_kinds_of_B_and_C(B_kind, C_kind, "triton")


@pytest.mark.parametrize("lengths", [[33, 0, 1, 66]], ids=str)
def test_scan_in_pieces(lengths):
    scan.test_scan_in_pieces(lengths, "triton")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 4, 5, 2, 3), (1, 3, 64, 1, 128)])
def test_state_update(shape, state_dtype):
    scan.test_state_update(*shape, state_dtype, "triton")


@pytest.mark.parametrize("case", [(4, 5, 2, 3, -1, torch.float32), (1, 37, 1, 16, 2, torch.bfloat16)])
def test_state_update_of_a_cache(case):
    scan.test_state_update_of_a_cache(*case, "triton")


@pytest.mark.parametrize("case", [(3, 1, -1, torch.float32), (5, 9, 2, torch.bfloat16)])
def test_conv_update_of_a_cache(case):
    conv.test_conv_update_of_a_cache(*case, "triton")


@pytest.mark.parametrize("case", [(4, 3, torch.float16), (3, 9, torch.bfloat16)])
def test_conv_update_of_rings(case):
    conv.test_conv_update_of_rings(*case, "triton")


def test_slots_that_do_not_exist(monkeypatch):
    """On a GPU the host does not read them: their outputs are NaN, and no state is touched."""
    monkeypatch.setattr("klfast.dispatch.checks.values_at_hand", lambda *_: [])
    for count, bad in ((4, 4), (4, 1 << 40), (4, -2)):
        slots, state, x = torch.tensor([bad, 2, -1]), torch.randn(count, 5, 3), torch.randn(3, 5)
        before, b = state.clone(), torch.randn(3, 3)
        with pins.using("triton"):
            step = ops.selective_state_update(state, x, x, -torch.ones(5, 3), b, b, state_batch_indices=slots)
            y = ops.causal_conv1d_update(x, state, torch.randn(5, 4), conv_state_indices=slots)
        for found in (step, y):
            assert found[0].isnan().all() and found[1].isfinite().all() and not found[2].any()
        assert torch.equal(state[[0, 1, 3]], before[[0, 1, 3]]) and (state[2] != before[2]).any()


def test_conv_of_packed_sequences():
    conv.test_conv_of_packed_sequences(4, torch.float32, "triton")


def test_chunk_scan_of_packed_sequences():
    scan.test_chunk_scan_of_packed_sequences(torch.bfloat16, "triton")


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 1), (2, 2, 4, 5, 2, 3), (1, 33, 2, 16, 1, 16), (1, 5, 2, 64, 1, 128), (1, 0, 2, 4, 1, 4)]
)
def test_chunk_scan(shape, monkeypatch):
    monkeypatch.setattr(ssd_scan, "is_for", lambda *_: False)  # step by step
    scan.test_chunk_scan(*shape, "triton")


@pytest.mark.parametrize("shape", [(2, 70, 2, 16, 2, 32), (1, 70, 1, 64, 1, 128), (1, 16, 2, 128, 2, 16)])
def test_chunk_scan_in_chunks(shape, family):
    """Values in two bfloat16 parts lose more in the interpreter, which truncates instead of rounding."""
    variants = [(True, torch.bfloat16), (False, torch.float16)]
    assert all(
        ssd_scan.is_for(torch.empty(1, *shape[1:4], dtype=dtype), *[torch.empty(1, 1, 1, shape[5], dtype=dtype)] * 2)
        for _, dtype in variants
    )
    scan.check_chunk_scan(*shape, variants, factor=12)


def test_chunks_after_steps_that_forget_everything():
    """Steps so long that the sum of their logarithms would leave no digits for later ones."""
    x, b = torch.randn(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    dt = torch.full((1, 40, 1), 0.125)
    dt[:, ::9] = 1e6
    operands = [t.bfloat16() for t in (x, dt, -torch.ones(1), b, b)]
    found = ops.mamba_chunk_scan_combined(*operands, 64)
    ssm_truth.close(found, ops.mamba_chunk_scan_combined(*(t.float() for t in operands), 64).double(), torch.bfloat16)


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
    true, state = ssm_truth.true_scan(
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
        ops.selective_scan_fn(ones, x[None, :, None], torch.zeros(x.numel(), 1), b, b, delta_softplus=True),
        torch.log1p(torch.exp(-true.abs())) + true.clamp_min(0),
    )
    check(
        ops.causal_conv1d_fn(x[None, :, None], torch.ones(x.numel(), 1), activation="silu"),
        true / (1 + torch.exp(-true)),
    )
