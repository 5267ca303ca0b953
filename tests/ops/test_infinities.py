"""Infinite inputs: each result is finite, +inf, -inf or NaN exactly where the float64 formula is, at every tier."""

import math

import pytest
import torch
import torch.nn.functional as F
from ssm_truth import true_scan

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec

ROUNDS = range(12)


def some(*shape, dtype=torch.float32, share=0.03):
    """Return random numbers, some of them infinite."""
    t = torch.randn(shape)
    return torch.where(torch.rand(shape) < share, t.sign() * math.inf, t).to(dtype)


def kinds(t):
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.double().sign(), 0.0))


def check(found, truth):
    assert found.shape == truth.shape
    fits = truth.abs() < torch.finfo(found.dtype).max / 2  # larger values are infinite in the dtype
    expected = torch.where(fits | ~truth.isfinite(), kinds(truth), truth.sign())
    assert torch.equal(kinds(found), expected)
    finite = expected == 0
    torch.testing.assert_close(found.double()[finite], truth[finite], rtol=2e-2, atol=2e-2)


def product(x, weight, bias=None):
    """Multiply term by term: a matrix product may treat other terms as 0."""
    y = (x.double()[:, None] * weight.double()[None]).sum(-1)
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_linear(dtype, tier):
    for _ in ROUNDS:
        for m in (1, 5, 20):
            x, weight, bias = some(m, 33, dtype=dtype), some(19, 33, dtype=dtype), some(19)
            check(ops.linear(x, weight, bias), product(x, weight, bias))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dequant_matmul(dtype, symmetric, bits, tier):
    for group in (-1, 16, 10):
        qt = quantize(torch.randn(19, 83) + torch.randn(19, 1), QuantSpec(bits, group, symmetric))
        for m in (1, 3, 6, 20):
            x, bias = some(m, 83, dtype=dtype), some(19)
            check(ops.dequant_matmul(x, qt, bias), product(x, qt.dequantize(torch.float32), bias))


def test_decode_attention(tier):
    for _ in ROUNDS:
        q, k, v = some(2, 6, 9), some(2, 2, 17, 9), some(2, 2, 17, 5)
        scores = (0.25 * q.double()[:, :, None] * k.double().repeat_interleave(3, 1)).sum(-1)
        check(
            ops.decode_attention(q, k, v, 0.25),
            (scores.softmax(-1)[..., None] * v.double().repeat_interleave(3, 1)).sum(2),
        )


def test_convolutions(tier):
    for silu in (None, "silu"):
        for width in (1, 3, 4, 6):
            x, weight, bias, state = some(2, 21, 19), some(21, width), some(21), some(2, 21, width - 1)
            sequence = torch.cat((state, x), -1).double()
            truth = (
                sum(weight.double()[:, i, None] * sequence[..., i : i + 19] for i in range(width))
                + bias.double()[:, None]
            )
            truth = F.silu(truth) if silu else truth
            found, final = ops.causal_conv1d_fn(x, weight, bias, None, state, True, None, silu)
            check(found, truth)
            assert torch.equal(final.double(), sequence[..., 19:])
            check(ops.causal_conv1d_update(x, state, weight, bias, silu), truth)
            assert torch.equal(state.double(), sequence[..., 19:])


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("states", [1, 3, 16, 17])
def test_scans(states, full, tier):
    for _ in ROUNDS:
        u, delta, z = some(2, 18, 9), some(2, 18, 9), some(2, 18, 9)
        A, B, C, D, bias, initial = (
            -some(18, states).abs(),
            some(2, 2, states, 9),
            some(2, 2, states, 9),
            some(18),
            some(18),
            some(2, 18, states),
        )
        if not full:
            D = z = bias = initial = None
        truth, last = true_scan(u, delta, A, B, C, D, z, bias, True, initial)
        found, state = ops.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True, initial)
        check(found, truth)
        check(state, last)
        state, first = (
            torch.zeros(2, 18, states) if initial is None else initial.clone(),
            (None if z is None else z[..., 0]),
        )
        truth, last = true_scan(
            u[..., :1],
            delta[..., :1],
            A,
            B[:, :1, :, :1],
            C[:, :1, :, :1],
            D,
            None if z is None else z[..., :1],
            bias,
            True,
            state,
        )
        check(
            ops.selective_state_update(
                state, u[..., 0], delta[..., 0], A, B[:, 0, :, 0], C[:, 0, :, 0], D, first, bias, True
            ),
            truth[..., 0],
        )
        check(state, last)


@pytest.mark.parametrize("full", [True, False])
def test_chunk_scan(full, tier):
    batch, length, heads, dim, groups, states = 1, 70, 4, 5, 2, 3
    for _ in ROUNDS:
        x, z = some(batch, length, heads, dim, share=0.005), some(batch, length, heads, dim, share=0.005)
        dt, A = some(batch, length, heads, share=0.005), -torch.rand(heads)
        B, C = some(batch, length, groups, states, share=0.005), some(batch, length, groups, states, share=0.005)
        D, bias, initial = some(heads, dim), torch.randn(heads), some(batch, heads, dim, states)
        kwargs = dict(D=D, z=z, dt_bias=bias, initial_states=initial) if full else {}
        channels = lambda t: t.permute(0, 2, 3, 1).reshape(batch, heads * dim, length)  # noqa: E731
        each = lambda t: t[:, None].expand(-1, dim).reshape(-1)  # noqa: E731
        truth, last = true_scan(
            channels(x),
            channels(dt[..., None].expand_as(x)),
            each(A)[:, None].expand(-1, states),
            B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1),
            D.reshape(-1) if full else None,
            channels(z) if full else None,
            each(bias) if full else None,
            True,
            initial.reshape(batch, heads * dim, states) if full else None,
        )
        found, final = ops.mamba_chunk_scan_combined(
            x, dt, A, B, C, 64, **kwargs, dt_softplus=True, return_final_states=True
        )
        check(channels(found), truth)
        check(final.reshape(last.shape), last)


def test_rms_norm(tier):
    for _ in ROUNDS:
        x, weight, gate = some(3, 2, 30), some(30), some(3, 2, 30)
        v = (x.double() * F.silu(gate.double())).unflatten(-1, (3, 10))
        check(
            ops.rms_norm(x, weight, gate, 1e-5, 10),
            (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight.double(),
        )
