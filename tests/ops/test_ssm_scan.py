"""The recurrences of Mamba and Mamba-2 at every tier against a float64 recurrence written step by step."""

import itertools

import pytest
import torch
from ssm_truth import close, make, poison, true_scan

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES as DTYPES

FACTOR_OF_STATES = 2  # times float32's tolerance; kernels that multiply in 16 bits lose more


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


# selective_scan ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("C_kind", ["one", "groups", "constant"])
@pytest.mark.parametrize("B_kind", ["one", "groups", "constant"])
def test_scan_takes_any_kinds_of_B_and_C(B_kind, C_kind, tier):  # noqa: N802
    """[B, N, L], [B, G, N, L] and [D, N] in any pair; several groups need the same number in both."""
    if {B_kind, C_kind} == {"one", "groups"}:
        C_kind = B_kind
    length = 37
    for channels, states, dtype in ((21, 5, torch.float32), (33, 16, torch.bfloat16), (150, 3, torch.float16)):

        def coefficients(kind, channels=channels, states=states, dtype=dtype):
            shape = {"one": (2, states, length), "groups": (2, 3, states, length), "constant": (channels, states)}[kind]
            t = make(*shape, dtype=dtype, last=0)
            if kind == "constant":
                return t, t[None, :, :, None].expand(2, -1, -1, length)
            return t, (t[:, None] if kind == "one" else t).repeat_interleave(channels // (1 if kind == "one" else 3), 1)

        (B, B_of_channels), (C, C_of_channels) = coefficients(B_kind), coefficients(C_kind)
        u, delta, z = (make(2, channels, length, dtype=dtype, last=1) for _ in range(3))
        A, D, bias, initial = -torch.rand(channels, states), make(channels), make(channels), make(2, channels, states)
        found, last = ops.selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True, initial)
        expected, state = true_scan(u, delta, A, B_of_channels, C_of_channels, D, z, bias, True, initial)
        close(found, expected, dtype, factor=2)
        close(last, state, factor=2)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "groups", "states", "padding"), [(4, 5, 2, 3, -1), (3, 64, 1, 128, 90), (1, 37, 1, 16, 2)]
)
def test_state_update_of_a_cache(heads, dim, groups, states, padding, dtype, tier):
    """Entries find their state wherever it is; padding gets zeros, and all other states stay."""
    batch, cache = 7, 11
    slots = torch.randperm(cache)[:batch]
    slots[::3] = padding
    own = slots != padding
    x, dt, z = (make(batch, heads, dim, dtype=dtype, last=1) for _ in range(3))
    B, C = (make(batch, groups, states, dtype=dtype) for _ in range(2))
    A, D, bias = -torch.rand(heads, dim, states), make(heads, dim), make(heads, dim)
    flat = lambda t: t[own].reshape(-1, heads * dim, 1)  # noqa: E731
    for last, index_dtype in ((3, torch.int32), (1, torch.int64)):
        state = make(cache, heads, dim, states, dtype=dtype, last=last)
        before = state.clone()
        truth, after = true_scan(
            flat(x),
            flat(dt),
            A.reshape(-1, states),
            B[own][..., None],
            C[own][..., None],
            D.flatten(),
            flat(z),
            bias.flatten(),
            True,
            before[slots[own]].reshape(-1, heads * dim, states),
        )
        indices = torch.stack((slots, slots), 1)[:, 0].to(index_dtype)  # with gaps
        found = ops.selective_state_update(state, x, dt, A, B, C, D, z, bias, True, indices, padding)
        close(found[own], truth.view(-1, heads, dim), dtype)
        assert not found[~own].any()
        close(state[slots[own]], after.view(-1, heads, dim, states), dtype)
        others = [slot for slot in range(cache) if slot not in slots[own]]
        assert torch.equal(state[others], before[others])


def test_state_update_of_a_cache_without_heads(tier):
    state, x, dt, A, B, C = make(5, 7, 3), make(2, 7), make(2, 7), -torch.rand(7, 3), make(2, 3), make(2, 3)
    alone, slots = state[[4, 1]].clone(), torch.tensor([4, 1])
    expected = ops.selective_state_update(alone, x, dt, A, B, C, dt_softplus=True)
    found = ops.selective_state_update(state, x, dt, A, B, C, dt_softplus=True, state_batch_indices=slots)
    assert torch.equal(found, expected) and torch.equal(state[[4, 1]], alone)


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


LIMITS = [0, 3, 4, 69, 80]
RUNS = torch.tensor([[0] * 3 + [2] + [5] * 65 + [6] * 11, [-1] * 5 + [0] * 70 + [1] * 2 + [-1] * 3])


def scan_operands(batch, dtype):
    """Return the arguments of a chunk scan of 80 steps up to its D, and the rest by name."""
    x, z = (make(batch, 80, 6, 16, dtype=dtype) for _ in range(2))
    B, C = (make(batch, 80, 2, 16, dtype=dtype) for _ in range(2))
    dt, A, D, bias = make(batch, 80, 6, dtype=dtype), -torch.rand(6) * 4, make(6, 16), make(6)
    return (x, dt, A, B, C, 64, D), dict(z=z, dt_bias=bias, dt_softplus=True, dt_limit=(0.01, 1.5))


def scan_alone(operands, options, row, first, end, initial):
    """Scan some steps of a row as a sequence of its own, in float64."""
    (x, dt, A, B, C, _, D), (z, bias, _, limit) = operands, options.values()
    step = torch.logaddexp(dt.double() + bias.double(), torch.zeros(())).clamp(*limit)
    x, step, B, C, z = (t[row : row + 1, first:end].double() for t in (x, step, B, C, z))
    channels = lambda t: t.permute(0, 2, 3, 1).flatten(1, 2)  # noqa: E731
    y, state = true_scan(
        channels(x),
        channels(step[..., None].expand_as(x)),
        A.repeat_interleave(16)[:, None].expand(-1, 16),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        D.flatten(),
        channels(z),
        None,
        False,
        None if initial is None else initial.reshape(1, 96, 16),
    )
    return y.view(1, 6, 16, -1).permute(0, 3, 1, 2), state.view(1, 6, 16, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_scan_of_packed_sequences(dtype, tier):
    """seq_idx: each sequence begins with zeros, the first of a row with initial_states; so does padding."""
    operands, options = scan_operands(2, dtype)
    for initial in (None, make(2, 6, 16, 16, last=2)):
        y, final = ops.mamba_chunk_scan_combined(
            *operands, **options, seq_idx=RUNS, initial_states=initial, return_final_states=True
        )
        for row in range(2):
            numbers, counts = RUNS[row].unique_consecutive(return_counts=True)
            ends, begins = counts.cumsum(0).tolist(), RUNS[row][RUNS[row] >= 0][0]
            for number, first, end in zip(numbers, [0, *ends[:-1]], ends, strict=True):
                first_state = initial[row] if initial is not None and number == begins else None
                expected, state = scan_alone(operands, options, row, first, end, first_state)
                close(y[row : row + 1, first:end], expected, dtype, factor=2)
            close(final[row : row + 1], state, factor=FACTOR_OF_STATES)
        only = ops.mamba_chunk_scan_combined(*operands, **options, seq_idx=RUNS.int(), initial_states=initial)
        assert torch.equal(only, y) and only.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_scan_by_limits(dtype, tier):
    """cu_seqlens says what seq_idx says, and gives the state after each sequence, also after an empty one."""
    operands, options = scan_operands(1, dtype)
    initial = make(1, 6, 16, 16)
    limits, same = torch.tensor(LIMITS), dict(seq_idx=RUNS[:1], return_final_states=True, initial_states=initial)
    y, final, states = ops.mamba_chunk_scan_combined(
        *operands, **options, **same, cu_seqlens=limits, return_varlen_states=True
    )
    expected, last = ops.mamba_chunk_scan_combined(*operands, **options, **same)
    assert torch.equal(y, expected) and torch.equal(final, last) and torch.equal(states[-1:], final)
    for i, (first, end) in enumerate(itertools.pairwise(LIMITS)):
        _, state = scan_alone(operands, options, 0, first, end, None if i else initial)
        close(states[i : i + 1], state, factor=FACTOR_OF_STATES)
    with_empty = torch.tensor([0, 0, *LIMITS, 80], dtype=torch.int32)
    y_again, more = ops.mamba_chunk_scan_combined(
        *operands, **options, cu_seqlens=with_empty, return_varlen_states=True
    )
    assert torch.equal(more[2:-1][1:], states[1:]) and not more[[0, 1, -1]].any()
    assert torch.equal(y_again[:, 3:], y[:, 3:])  # the first sequence had a state before
    assert torch.equal(ops.mamba_chunk_scan_combined(*operands, **options, cu_seqlens=with_empty), y_again)
