"""The state-space ops at every tier against a float64 recurrence written step by step."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from klfast import ops
from klfast.core.errors import InvalidInputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


# causal_conv1d ----------------------------------------------------------------------------------------------------


def true_conv(x, weight, bias, initial, silu):
    past = torch.zeros(*x.shape[:2], weight.shape[1] - 1).double() if initial is None else initial.double()
    sequence = torch.cat((past, x.double()), -1)
    y = F.conv1d(sequence, weight.double()[:, None], None if bias is None else bias.double(), groups=x.shape[1])
    return F.silu(y) if silu else y, sequence[..., sequence.shape[-1] - past.shape[-1] :]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    ("batch", "channels", "length"), [(1, 1, 1), (2, 5, 2), (3, 48, 63), (1, 100, 100), (1, 1536, 17), (0, 5, 3)]
)
def test_conv(batch, channels, length, width, tier):
    for last, dtype, full in ((1, torch.float32, True), (2, torch.bfloat16, False), (1, torch.float16, True)):
        x, weight = make(batch, channels, length, dtype=dtype, last=last), make(channels, width)
        bias = make(channels, dtype=dtype) if full else None
        initial = make(batch, channels, width - 1, last=1) if full else None
        out, final = ops.causal_conv1d_fn(
            x, weight, bias, initial_states=initial, return_final_states=True, activation="silu" if full else None
        )
        expected, state = true_conv(x, weight, bias, initial, full)
        close(out, expected, dtype)
        close(final, state, dtype)
        assert out.dtype == dtype and (out.transpose(1, 2).is_contiguous() or not out.numel())


def test_empty_conv_keeps_the_state(tier):
    initial = make(2, 33, 3, last=1)
    out, final = ops.causal_conv1d_fn(
        torch.randn(2, 33, 0), make(33, 4), initial_states=initial, return_final_states=True
    )
    assert out.shape == (2, 33, 0) and torch.equal(final, initial)


@pytest.mark.parametrize("held", [3, 4, 9])
def test_conv_update_continues_a_sequence(held, tier):
    x, weight, bias = make(2, 21, 12), make(21, 4), make(21)
    expected, _ = true_conv(x, weight, bias, None, True)
    for state_dtype, lengths in itertools.product((torch.float32, torch.bfloat16), ([5, 1, 1, 4, 1], [1] * 12)):
        x_rounded = x.to(state_dtype).float()
        expected, _ = true_conv(x_rounded, weight, bias, None, True)
        state = torch.zeros(2, 21, held, dtype=state_dtype)
        pieces = [
            ops.causal_conv1d_update(piece, state, weight, bias, "silu") for piece in x_rounded.split(lengths, -1)
        ]
        close(torch.cat(pieces, -1), expected)
        assert torch.equal(state, x_rounded[..., -held:].to(state_dtype))
    close(
        ops.causal_conv1d_update(x[..., 0], torch.zeros(2, 21, held), weight, bias),
        true_conv(x[..., :1], weight, bias, None, False)[0][..., 0],
    )


# selective_scan ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("states", [1, 3, 16, 64, 128])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "groups"),
    [(1, 1, 1, 1), (2, 5, 2, 5), (1, 48, 63, 3), (2, 100, 100, 1), (1, 300, 33, 2)],
)
def test_scan(batch, channels, length, groups, states, tier):
    for last, dtype, full in ((1, torch.float32, True), (2, torch.bfloat16, True), (2, torch.float16, False)):
        u, delta, z = (make(batch, channels, length, dtype=dtype, last=last) for _ in range(3))
        B, C = (make(batch, groups, states, length, dtype=dtype, last=last + 1) for _ in range(2))
        A, D, bias = -torch.rand(channels, states) * 4, make(channels), make(channels)
        delta = delta if full else delta.abs()
        optional = (D, z, bias, True) if full else (None, None, None, False)
        initial = make(batch, channels, states, dtype=dtype, last=last) if full else None
        out, last_state = ops.selective_scan_fn(u, delta, A, B, C, *optional, True, initial)
        expected, state = true_scan(u, delta, A, B, C, *optional, initial)
        close(out, expected, dtype)
        close(last_state, state)
        assert out.dtype == dtype and last_state.dtype == torch.float32


def test_scan_takes_one_group_and_constants(tier):
    u, delta, A = make(2, 6, 9), make(2, 6, 9).abs(), -torch.rand(6, 4)
    one, constant = make(2, 4, 9), make(6, 4)
    close(
        ops.selective_scan_fn(u, delta, A, one, one),
        true_scan(u, delta, A, one[:, None], one[:, None], None, None, None, False)[0],
    )
    steady = constant[None, :, :, None].expand(2, -1, -1, 9)
    close(
        ops.selective_scan_fn(u, delta, A, constant, constant),
        true_scan(u, delta, A, steady, steady, None, None, None, False)[0],
    )


@pytest.mark.parametrize("lengths", [[100], [1] * 100, [33, 0, 1, 66], [64, 36]])
def test_scan_in_pieces(lengths, tier):
    """Cut a sequence anywhere: a piece's last state is the next one's first, and is not modified."""
    u, delta, z, B, C = make(2, 21, 100), make(2, 21, 100), make(2, 21, 100), make(2, 3, 6, 100), make(2, 3, 6, 100)
    A, D, bias = -torch.rand(21, 6) * 4, make(21), make(21)
    expected, last = true_scan(u, delta, A, B, C, D, z, bias, True)
    state, outputs = None, []
    for piece in zip(*(t.split(lengths, -1) for t in (u, delta, B, C, z)), strict=True):
        before = None if state is None else state.clone()
        out, after = ops.selective_scan_fn(*piece[:2], A, *piece[2:4], D, piece[4], bias, True, True, state)
        assert state is None or torch.equal(state, before)
        outputs.append(out)
        state = after
    close(torch.cat(outputs, -1), expected)
    close(state, last)


def test_scan_forgets_and_remembers_over_long_sequences(tier):
    """Decays per step from 1 - 1e-6 to complete loss: no NaN, no drift beyond one rounding of the decay per step."""
    length = 2000
    u, delta = make(1, 16, length), torch.ones(1, 16, length)
    A = -torch.logspace(-6, 3, 16)[:, None].expand(16, 3)
    B = C = torch.ones(1, 3, length)
    out, state = ops.selective_scan_fn(u, delta, A, B, C, return_last_state=True)
    expected, last = true_scan(u, delta, A, B[:, None], C[:, None], None, None, None, False)
    close(out, expected, factor=length * 2**-24 / 2e-6)
    close(state, last, factor=length * 2**-24 / 2e-6)


# selective_state_update -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "dim", "groups", "states"),
    [(1, 1, 1, 1, 1), (2, 4, 5, 2, 3), (1, 3, 64, 1, 128), (3, 1, 100, 1, 16)],
)
def test_state_update(batch, heads, dim, groups, states, state_dtype, tier):
    for shared, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        x, z, dt = (make(batch, heads, dim, dtype=dtype) for _ in range(3))
        B, C = make(batch, groups, states, dtype=dtype), make(batch, groups, states, dtype=dtype)
        A, D, bias = -torch.rand(heads, dim, states), make(heads, dim), make(heads, dim)
        if shared:  # as transformers' Mamba-2 passes them
            A, dt = A[:, :1, :1].expand(-1, dim, states), dt[..., :1].expand(-1, -1, dim)
            D, bias = D[:, :1].expand(-1, dim), bias[:, :1].expand(-1, dim)
        state = make(batch, heads, dim, states).to(state_dtype)
        flat = (lambda t: t.reshape(batch, heads * dim, 1)), (lambda t: t.reshape(heads * dim, -1))
        expected, after = true_scan(
            flat[0](x),
            flat[0](dt),
            flat[1](A),
            B[..., None],
            C[..., None],
            flat[1](D)[:, 0],
            flat[0](z),
            flat[1](bias)[:, 0],
            True,
            state.reshape(batch, heads * dim, states),
        )
        out = ops.selective_state_update(state, x, dt, A, B, C, D, z, bias, True)
        close(out, expected.view(batch, heads, dim), dtype)
        close(state, after.view(state.shape), state_dtype)
        assert state.dtype == state_dtype


def test_state_update_without_heads(tier):
    state, x, dt, A, B, C = make(2, 7, 5), make(2, 7), make(2, 7), -torch.rand(7, 5), make(2, 5), make(2, 5)
    expected, after = true_scan(
        x[..., None], dt[..., None], A, B[:, None, :, None], C[:, None, :, None], None, None, None, True, state
    )
    close(ops.selective_state_update(state, x, dt, A, B, C, dt_softplus=True), expected[..., 0])
    close(state, after)


# mamba_chunk_scan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim", "groups", "states"),
    [
        (1, 1, 1, 1, 1, 1),
        (2, 2, 4, 5, 2, 3),
        (1, 63, 2, 16, 1, 16),
        (2, 100, 3, 48, 3, 7),
        (1, 193, 2, 64, 1, 128),
        (1, 0, 2, 4, 1, 4),
    ],
)
def test_chunk_scan(batch, length, heads, dim, groups, states, tier):
    check_chunk_scan(
        batch,
        length,
        heads,
        dim,
        groups,
        states,
        ((True, torch.float32), (False, torch.bfloat16), (True, torch.float16)),
        factor=2,
    )


def check_chunk_scan(batch, length, heads, dim, groups, states, variants, factor):
    """Check variants (all optional operands or none, dtype); factor: of float32's tolerance, for the final state."""
    for full, dtype in variants:
        x, z = make(batch, length, heads, dim, dtype=dtype), make(batch, length, heads, dim, dtype=dtype, last=1)
        B, C = (make(batch, length, groups, states, dtype=dtype) for _ in range(2))
        dt, A, D, bias = make(batch, length, heads, dtype=dtype), -torch.rand(heads) * 4, make(heads, dim), make(heads)
        initial, limit = make(batch, heads, dim, states, last=2), (0.01, 1.5)
        if not full:
            D = D[:, 0]
        kwargs = dict(D=D, z=z, dt_bias=bias, initial_states=initial) if full else dict(D=D)
        out, final = ops.mamba_chunk_scan_combined(
            x, dt, A, B, C, 256, **kwargs, dt_softplus=True, dt_limit=limit, return_final_states=True
        )
        step = dt.double() + (bias.double() if full else 0)
        step = torch.logaddexp(step, torch.zeros(())).clamp(*limit)
        channels = lambda t: t.permute(0, 2, 3, 1).reshape(batch, heads * dim, length)  # noqa: E731
        expected, state = true_scan(
            channels(x),
            channels(step[..., None].expand_as(x)),
            A[:, None].expand(-1, dim).reshape(-1, 1).expand(-1, states),
            B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1),
            D[:, None].expand(-1, dim).reshape(-1) if D.dim() == 1 else D.reshape(-1),
            channels(z) if full else None,
            None,
            False,
            initial.reshape(batch, heads * dim, states) if full else None,
        )
        close(out, expected.view(batch, heads, dim, length).permute(0, 3, 1, 2), dtype, factor=2)
        close(final, state.view(batch, heads, dim, states), factor=factor)
        assert out.dtype == dtype and final.dtype == torch.float32
        same = ops.mamba_chunk_scan_combined(
            x, dt, A, B, C, 64, **kwargs, dt_softplus=True, dt_limit=limit, return_final_states=True
        )[0]
        assert torch.equal(same, out), "the chunk size changes nothing"
        close(
            ops.mamba_chunk_scan_combined(x, dt, A, B, C, 256, **kwargs, dt_softplus=True, dt_limit=limit),
            out.double(),
            dtype,
        )


# Elementary functions, through ops that expose them -----------------------------------------------------------------


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


# Registration and bad input ---------------------------------------------------------------------------------------


def test_opcheck():
    x, A, B = make(2, 5, 9), -torch.rand(5, 3), make(2, 1, 3, 9)
    op, check = torch.ops.klfast, torch.library.opcheck
    check(op.causal_conv1d.default, (x, make(5, 4), make(5), None, torch.zeros(2, 5, 3), True))
    check(op.causal_conv1d_update.default, (x, make(2, 5, 4), make(5, 4), None, False))
    check(op.selective_scan.default, (x, x, A, B, B, make(5), x, make(5), None, True))
    check(op.selective_scan.default, (x, x, A, B, B, None, None, None, make(2, 5, 3), False))
    check(
        op.selective_state_update.default,
        (make(2, 1, 5, 3), x[:, None, :, 0], x[:, None, :, 1], A[None], B[..., 0], B[..., 1], None, None, None, True),
    )
    step = (
        make(2, 9, 2, 5),
        make(2, 9, 2),
        -torch.rand(2),
        make(2, 9, 1, 3),
        make(2, 9, 1, 3),
        None,
        None,
        None,
        None,
        True,
        0.0,
        math.inf,
        True,
    )
    check(op.mamba_chunk_scan.default, step)
    check(op.rms_norm.default, (x, make(9), None, 1e-5, 3, False, False, 0.0))


X, W, A, BC = torch.zeros(2, 5, 9), torch.zeros(5, 4), torch.zeros(5, 3), torch.zeros(2, 1, 3, 9)
HEADS = (
    torch.zeros(2, 9, 4, 5),
    torch.zeros(2, 9, 4),
    torch.zeros(4),
    torch.zeros(2, 9, 3, 6),
    torch.zeros(2, 9, 3, 6),
    64,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.causal_conv1d_fn(X, W, activation="gelu"), "activation"),
        (lambda: ops.causal_conv1d_fn(X, W, seq_idx=torch.zeros(2, 9)), "seq_idx"),
        (lambda: ops.causal_conv1d_fn(X.long(), W), "x must be float32"),
        (lambda: ops.causal_conv1d_fn(X, W[:4]), r"weight must be \[5, W\]"),
        (lambda: ops.causal_conv1d_fn(X, W.sum(), return_final_states=True), r"weight must be \[5, W\]"),
        (lambda: ops.causal_conv1d_fn(X[0], W), r"x must be \[B, D, L\]"),
        (lambda: ops.causal_conv1d_fn(X, W, initial_states=X[..., :2]), "initial_states"),
        (lambda: ops.causal_conv1d_fn(X, W.to("meta")), "one device"),
        (lambda: ops.causal_conv1d_update(X, X[..., :2].clone(), W), "conv_state must hold at least 3"),
        (lambda: ops.causal_conv1d_update(X, X.clone(), W, cache_seqlens=torch.zeros(2)), "cache_seqlens"),
        (lambda: ops.causal_conv1d_update(X, X.clone(), W, conv_state_indices=torch.zeros(2)), "conv_state_indices"),
        (lambda: ops.selective_scan_fn(X, X, A.to(torch.complex64), BC, BC), "real"),
        (lambda: ops.selective_scan_fn(X, X[..., :3], A, BC, BC), "delta"),
        (lambda: ops.selective_scan_fn(X, X, A, BC.expand(-1, 2, -1, -1), BC.expand(-1, 2, -1, -1)), "groups"),
        (
            lambda: ops.selective_scan_fn(X, X, A, BC, BC, initial_states=torch.zeros(2, 3, 5)),
            r"initial_states must be \[2, 5, 3\]",
        ),
        (lambda: ops.selective_state_update(torch.zeros(2, 5, 3), X[..., 0], X[..., 0], A, A, A), "B must be"),
        (lambda: ops.mamba_chunk_scan_combined(*HEADS), "groups"),
        (lambda: ops.mamba_chunk_scan_combined(*HEADS, cu_seqlens=torch.zeros(2)), "cu_seqlens"),
        (lambda: ops.mamba_chunk_scan_combined(*HEADS, seq_idx=torch.zeros(2)), "seq_idx"),
        (
            lambda: ops.mamba_chunk_scan_combined(
                *HEADS[:3], HEADS[3][:, :, :1], HEADS[4][:, :, :1], 64, dt_limit=(1.0, 0.0)
            ),
            "dt_limit",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
