"""Float64 truths of the state-space ops, random operands with gaps in memory, and outputs that start as NaN."""

import math

import torch
import torch.nn.functional as F

TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 5e-3,
    torch.float16: 6e-4,
}  # of the largest value; the storage type's rounding


def close(actual, expected, dtype=torch.float32, factor=1.0):
    """Within the dtype's rounding of the float64 truth, relative to its largest value; no NaN remains."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = (actual.double() - expected).abs().max() / (expected.abs().max() + 1)
        assert error <= factor * TOLERANCE[dtype], f"error {error:.1e}"


def make(*shape, dtype=torch.float32, last=None):
    """Return a random tensor; ``last``: the contiguous dimension, inside a larger block (so that rows have gaps)."""
    order = list(range(len(shape)))
    if last is not None:
        order.remove(last % len(shape))
        order.append(last % len(shape))
    memory = torch.randn(*(shape[i] for i in order[:-1]), shape[order[-1]] + 3)[..., 1:-2].to(dtype)
    return memory.permute(*(order.index(i) for i in range(len(shape))))


def poison(monkeypatch):
    """Let every new output start as NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    fill = lambda t: t.fill_(math.nan) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


def true_conv(x, weight, bias, initial, silu):
    past = torch.zeros(*x.shape[:2], weight.shape[1] - 1).double() if initial is None else initial.double()
    sequence = torch.cat((past, x.double()), -1)
    y = F.conv1d(sequence, weight.double()[:, None], None if bias is None else bias.double(), groups=x.shape[1])
    return F.silu(y) if silu else y, sequence[..., sequence.shape[-1] - past.shape[-1] :]


def true_scan(u, delta, A, B, C, D, z, bias, softplus, state=None):
    u, delta, A, B, C, D, z, bias = (None if t is None else t.double() for t in (u, delta, A, B, C, D, z, bias))
    dt = delta if bias is None else delta + bias[:, None]
    dt = torch.logaddexp(dt, torch.zeros(())) if softplus else dt
    each = u.shape[1] // B.shape[1]
    h = torch.zeros(u.shape[0], *A.shape).double() if state is None else state.double()
    rows = []
    for t in range(u.shape[-1]):
        b, c = (v[..., t].repeat_interleave(each, 1) for v in (B, C))
        h = torch.exp(dt[..., t, None] * A) * h + (dt * u)[..., t, None] * b
        rows.append((h * c).sum(-1) + (0 if D is None else D * u[..., t]))
    y = torch.stack(rows, -1) if rows else u
    return y if z is None else y * F.silu(z), h
