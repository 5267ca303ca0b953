"""The causal convolution at every tier against float64."""

import itertools

import pytest
import torch
from ssm_truth import close, make, poison, true_conv

from klfast import ops
from klfast.core.dtypes import FLOAT_DTYPES as DTYPES


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


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


def slots_of(batch, cache, padding):
    """Return slots of a batch in a cache, in random order, every third entry without a state."""
    slots = torch.randperm(cache)[:batch]
    slots[::3] = padding
    return slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("held", "length", "padding"), [(3, 1, -1), (4, 3, 60), (9, 20, -1), (5, 2, 2)])
def test_conv_update_of_a_cache(held, length, padding, dtype, tier):
    """Entries find their state wherever it is; padding gets zeros, and all other states stay."""
    batch, cache, channels = 7, 11, 37
    x, weight, bias = make(batch, channels, length, dtype=dtype, last=1), make(channels, 4), make(channels)
    slots = slots_of(batch, cache, padding)
    for last, index_dtype in ((1, torch.int32), (2, torch.int64)):
        state = make(cache, channels, held, dtype=dtype, last=last)
        expected, state_after = torch.zeros(x.shape).double(), state.clone()
        for i, slot in enumerate(slots.tolist()):
            if slot != padding:
                sequence = torch.cat((state[slot], x[i]), -1)
                state_after[slot] = sequence[:, -held:]
                past = state[slot, :, held - 3 :]
                expected[i] = true_conv(x[i : i + 1], weight, bias, past[None], True)[0]
        indices = torch.stack((slots, slots), 1)[:, 0].to(index_dtype)  # with gaps
        found = ops.causal_conv1d_update(
            x, state, weight, bias, "silu", conv_state_indices=indices, pad_slot_id=padding
        )
        close(found, expected, dtype)
        assert torch.equal(state, state_after)
        assert not found[slots == padding].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "held"), [(4, 3), (3, 4), (4, 9), (1, 2), (6, 5)])
def test_conv_update_of_rings(width, held, dtype, tier):
    """Sequences that began at different times, each in its ring, longer pieces than a ring or a tile holds, too."""
    lengths, channels = [1, 2, 1, 35, 1, held + 1], 21
    total, past = sum(lengths), width - 1
    for slots in (None, torch.tensor([3, 0, -1, 1])):
        batch, cache = 4, 4 if slots is None else 5
        x, weight, bias = make(batch, channels, total, dtype=dtype), make(channels, width), make(channels)
        seen = torch.tensor([0, 2, 7, 1001], dtype=torch.int32)
        before = make(batch, channels, held, dtype=dtype)  # the last steps of each, in order of time
        state = torch.full((cache, channels, held), 7.0, dtype=dtype)
        places = range(batch) if slots is None else slots.tolist()
        for i, slot in enumerate(places):
            for j in range(held):
                state[slot, :, (seen[i] + j) % held] = before[i, :, j]
        if slots is not None:
            state[-1] = 7.0  # where -1 would be if it were no padding
        expected, _ = true_conv(x, weight, bias, before[..., held - past :] if past else before[..., :0], True)
        found, so_far = [], seen.clone()
        for piece in x.split(lengths, -1):
            found.append(
                ops.causal_conv1d_update(
                    piece, state, weight, bias, "silu", cache_seqlens=so_far, conv_state_indices=slots
                )
            )
            so_far += piece.shape[-1]
        if slots is not None:
            expected[2] = 0.0
            assert (state[-1] == 7.0).all() and (state[2] == 7.0).all()
        close(torch.cat(found, -1), expected, dtype)
        for i, slot in enumerate(places):
            for t in range(total - held, total):
                assert slot < 0 or torch.equal(state[slot, :, (seen[i] + t) % held], x[i, :, t])


def test_a_ring_keeps_what_is_older(tier):
    """One step writes one value: the others stay, bit for bit, even those that the convolution would shift out."""
    state = make(2, 33, 9)
    before, x = state.clone(), make(2, 33)
    ops.causal_conv1d_update(x, state, make(33, 4), cache_seqlens=torch.tensor([3, 17]))
    before[0, :, 3], before[1, :, 8] = x
    assert torch.equal(state, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 4])
def test_conv_of_packed_sequences(width, dtype, tier):
    seq_idx = torch.tensor([[-1] * 2 + [4] * 19 + [5] + [9] * 18, [0] * 2 + [1] * 30 + [-1] * 3 + [7] * 2 + [-7] * 3])
    x, weight, bias = make(2, 37, 40, dtype=dtype, last=1), make(37, width), make(37)
    for dtype_of_index, initial in ((torch.int32, None), (torch.int64, make(2, 37, width - 1, dtype=dtype))):
        expected = torch.zeros(x.shape).double()
        for row in range(2):
            for index in seq_idx[row].unique().tolist():
                steps = seq_idx[row] == index
                begins = index == seq_idx[row][seq_idx[row] >= 0][0]  # the row, though padding may come before it
                past = initial[row : row + 1] if initial is not None and begins else None
                if index >= 0:
                    expected[row, :, steps] = true_conv(x[row : row + 1, :, steps], weight, bias, past, True)[0][0]
        out = ops.causal_conv1d_fn(x, weight, bias, seq_idx.to(dtype_of_index), initial, activation="silu")
        close(out, expected, dtype)
        assert out.transpose(1, 2).is_contiguous() and not out.transpose(1, 2)[seq_idx < 0].any()
    assert ops.causal_conv1d_fn(x[..., :0], weight, bias, seq_idx[:, :0]).shape == (2, 37, 0)


@pytest.mark.parametrize("state_len", [0, 1, 3, 8])
def test_states_after_packed_sequences(state_len):
    for dtype in DTYPES:
        x = make(13, 5, dtype=dtype)
        states = ops.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 10, 13]), state_len)
        assert states.shape == (4, 5, state_len) and states.dtype == dtype
        for state, piece in zip(states, x.split([2, 0, 8, 3]), strict=True):
            padded = torch.cat((torch.zeros(state_len, 5, dtype=dtype), piece))
            assert torch.equal(state, padded[len(padded) - state_len :].T)
