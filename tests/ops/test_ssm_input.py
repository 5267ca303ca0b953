"""Registration of the state-space ops, and bad input."""

import math

import pytest
import torch
from ssm_truth import make

from klfast import ops
from klfast.core.errors import InvalidInputError


def test_opcheck():
    x, A, B = make(2, 5, 9), -torch.rand(5, 3), make(2, 1, 3, 9)
    op, check = torch.ops.klfast, torch.library.opcheck
    check(op.causal_conv1d.default, (x, make(5, 4), make(5), None, torch.zeros(2, 5, 3), True))
    slots, seen = torch.tensor([2, 0]), torch.tensor([0, 3], dtype=torch.int32)
    check(op.causal_conv1d_update.default, (x, make(2, 5, 4), make(5, 4), None, False, None, None, -1))
    check(op.causal_conv1d_update.default, (x, make(3, 5, 4), make(5, 4), None, False, seen, slots, -1))
    check(op.selective_scan.default, (x, x, A, B, B, make(5), x, make(5), None, True))
    check(op.selective_scan.default, (x, x, A, B, make(5, 3), None, None, None, make(2, 5, 3), False))
    of_step = (x[:, None, :, 0], x[:, None, :, 1], A[None], B[..., 0], B[..., 1], None, None, None, True)
    check(op.selective_state_update.default, (make(2, 1, 5, 3), *of_step, None, -1))
    check(op.selective_state_update.default, (make(3, 1, 5, 3), *of_step, slots, 2))
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


X, W, A, BC = torch.zeros(2, 5, 9), torch.zeros(5, 4), torch.zeros(5, 3), torch.zeros(2, 1, 3, 9)
HEADS = (
    torch.zeros(2, 9, 4, 5),
    torch.zeros(2, 9, 4),
    torch.zeros(4),
    torch.zeros(2, 9, 3, 6),
    torch.zeros(2, 9, 3, 6),
    64,
)
RISING = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2)
BACK = torch.tensor([[0] * 9, [0, 3, 3, 3, -1, 3, 4, 4, 4]])


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def step_of(indices, padding=-1):
    """Take a step of two entries with states in a cache of three."""
    state, x = torch.zeros(3, 5, 3), X[..., 0]
    return ops.selective_state_update(
        state, x, x, A, BC[:, 0, :, 0], BC[:, 0, :, 0], state_batch_indices=indices, pad_slot_id=padding
    )


def scan_of(batch=2, **options):
    x, dt, rate, b, _, _ = HEADS
    return ops.mamba_chunk_scan_combined(x[:batch], dt[:batch], rate, b[:batch, :, :1], b[:batch, :, :1], 64, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.causal_conv1d_fn(X, W, activation="gelu"), "activation"),
        (lambda: ops.causal_conv1d_fn(X, W, seq_idx=torch.zeros(2, 9)), r"seq_idx must be int32 or int64 \[2, 9\]"),
        (lambda: ops.causal_conv1d_fn(X, W, seq_idx=ints(2, 9)[0]), r"seq_idx must be int32 or int64 \[2, 9\]"),
        (
            lambda: ops.causal_conv1d_fn(X, W, seq_idx=RISING.flip(1)),
            "must rise along each row.* got 1 after 2 in row 0",
        ),
        (lambda: ops.causal_conv1d_fn(X, W, seq_idx=BACK), "must rise along each row.* got 3 after 3 in row 1"),
        (lambda: ops.causal_conv1d_fn(X, W, seq_idx=RISING, return_final_states=True), "without final states"),
        (
            lambda: ops.causal_conv1d_fn(X, W, seq_idx=RISING, initial_states=X[..., :2]),
            "initial_states must hold at least 3",
        ),
        (lambda: ops.causal_conv1d_fn(X, W[:4], seq_idx=RISING), r"weight must be \[5, W\]"),
        (lambda: ops.causal_conv1d_varlen_states(X, ints(2), 3), r"x must be \[T, D\]"),
        (lambda: ops.causal_conv1d_varlen_states(X[0], ints(3, 2), 3), r"cu_seqlens must be int32 or int64 \[6\]"),
        (
            lambda: ops.causal_conv1d_varlen_states(X[0], torch.tensor([0, 4, 3, 5]), 3),
            "cu_seqlens must rise from 0 to 5",
        ),
        (lambda: ops.causal_conv1d_varlen_states(X[0], torch.tensor([0, 5]), -1), "state_len must be at least 0"),
        (lambda: ops.causal_conv1d_fn(X.long(), W), "x must be float32"),
        (lambda: ops.causal_conv1d_fn(X, W[:4]), r"weight must be \[5, W\]"),
        (lambda: ops.causal_conv1d_fn(X, W.sum(), return_final_states=True), r"weight must be \[5, W\]"),
        (lambda: ops.causal_conv1d_fn(X[0], W), r"x must be \[B, D, L\]"),
        (lambda: ops.causal_conv1d_fn(X, W, initial_states=X[..., :2]), "initial_states"),
        (lambda: ops.causal_conv1d_fn(X, W.to("meta")), "one device"),
        (lambda: ops.causal_conv1d_update(X, X[..., :2].clone(), W), "conv_state must hold at least 3"),
        (lambda: ops.causal_conv1d_update(X, X.clone(), W, cache_seqlens=torch.zeros(2)), "cache_seqlens must be int"),
        (lambda: ops.causal_conv1d_update(X, X.clone(), W, cache_seqlens=ints(3)), r"cache_seqlens must be .*\[2\]"),
        (lambda: ops.causal_conv1d_update(X, X.clone(), W, cache_seqlens=ints(2) - 4), "at least 0, got -4"),
        (lambda: ops.causal_conv1d_update(X, X[..., :0].clone(), W[:, :1], cache_seqlens=ints(2)), "hold a value"),
        (
            lambda: ops.causal_conv1d_update(X, X.clone(), W, conv_state_indices=ints(2).float()),
            "must be int32 or int64",
        ),
        (lambda: ops.causal_conv1d_update(X, X.clone(), W, conv_state_indices=ints(2)), "at most once, got 0 more"),
        (
            lambda: ops.causal_conv1d_update(X, X.clone(), W, conv_state_indices=torch.tensor([0, 2])),
            "in 0..1, or -1.*2",
        ),
        (
            lambda: ops.causal_conv1d_update(X, X.clone(), W, conv_state_indices=torch.tensor([0, -2])),
            "padding; got -2",
        ),
        (lambda: step_of(torch.tensor([3, 0])), "state_batch_indices must be in 0..2, or -1 for padding; got 3"),
        (lambda: step_of(torch.tensor([-1, 0]), 7), "state_batch_indices must be in 0..2, or 7 for padding; got -1"),
        (lambda: step_of(torch.tensor([1, 1])), "state_batch_indices must name each state at most once"),
        (lambda: step_of(ints(3)), r"state_batch_indices must be int32 or int64 \[2\], got int64 \[3\]"),
        (lambda: step_of(None), r"x must be \[3, 1, 5\]"),
        (lambda: ops.selective_scan_fn(X, X, A.to(torch.complex64), BC, BC), "real"),
        (lambda: ops.selective_scan_fn(X, X[..., :3], A, BC, BC), "delta"),
        (lambda: ops.selective_scan_fn(X, X, A, A[:4], BC), r"B must be \[5, 3\]"),
        (lambda: ops.selective_scan_fn(X, X, A, BC, A[:, :2]), r"C must be \[5, 3\]"),
        (lambda: ops.selective_scan_fn(X, X, A, A, BC.expand(-1, 2, -1, -1)), "groups"),
        (lambda: ops.selective_scan_fn(X, X, A, BC.expand(-1, 2, -1, -1), BC.expand(-1, 2, -1, -1)), "groups"),
        (
            lambda: ops.selective_scan_fn(X, X, A, BC, BC, initial_states=torch.zeros(2, 3, 5)),
            r"initial_states must be \[2, 5, 3\]",
        ),
        (lambda: ops.selective_state_update(torch.zeros(2, 5, 3), X[..., 0], X[..., 0], A, A, A), "B must be"),
        (lambda: ops.mamba_chunk_scan_combined(*HEADS), "groups"),
        (lambda: ops.mamba_chunk_scan_combined(*HEADS, seq_idx=RISING), "groups"),
        (lambda: scan_of(cu_seqlens=torch.tensor([0, 9])), "cu_seqlens must rise .* for a batch of 2"),
        (lambda: scan_of(1, cu_seqlens=torch.zeros(2)), "cu_seqlens must be int32 or int64"),
        (lambda: scan_of(1, cu_seqlens=torch.tensor([0, 6, 4, 9])), "cu_seqlens must rise from 0 to 9"),
        (lambda: scan_of(1, cu_seqlens=torch.tensor([0, 6, 8])), "cu_seqlens must rise from 0 to 9"),
        (lambda: scan_of(1, cu_seqlens=torch.tensor([])), "cu_seqlens must be int32 or int64"),
        (lambda: scan_of(1, cu_seqlens=torch.tensor([0, 5, 9]), seq_idx=RISING[:1]), "mark the same sequences"),
        (lambda: scan_of(seq_idx=torch.zeros(2)), "seq_idx must be int32 or int64"),
        (lambda: scan_of(dt_limit=(1,)), r"dt_limit must be \(low, high\).* got \(1,\)"),
        (lambda: scan_of(seq_idx=BACK), "seq_idx must rise"),
        (lambda: scan_of(seq_idx=RISING.to("meta")), "one device"),
        (lambda: scan_of(return_varlen_states=True), "return_varlen_states needs cu_seqlens"),
        (lambda: scan_of(seq_idx=RISING, return_varlen_states=True), "return_varlen_states needs cu_seqlens"),
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


def test_bad_slots_change_nothing(tier):
    state, x = torch.randn(3, 5, 3), torch.randn(2, 5)
    before = state.clone()
    with pytest.raises(InvalidInputError):
        ops.selective_state_update(state, x, x, A, x[:, :3], x[:, :3], state_batch_indices=torch.tensor([1, 3]))
    with pytest.raises(InvalidInputError):
        ops.causal_conv1d_update(x, state, W, conv_state_indices=torch.tensor([2, 2], dtype=torch.int32))
    assert torch.equal(state, before)
