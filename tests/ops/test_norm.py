"""rms_norm at every tier against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from ssm_truth import close, make, poison

from klfast import ops
from klfast.core.errors import InvalidInputError

GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    poison(monkeypatch)


def true_norm(x, weight, gate, group, last=False, activation="silu", offset=0.0):
    gate = 1 if gate is None else GATES[activation](gate.double())
    v = x.double() if last else x.double() * gate
    grouped = v.reshape(*x.shape[:-1], -1, group or x.shape[-1]) if v.numel() else v
    normed = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
    return normed * (weight.double() + offset) * (gate if last else 1)


@pytest.mark.parametrize(
    ("shape", "group"), [((1,), 1), ((3, 63), 21), ((2, 5, 100), None), ((2, 3, 4, 48), 16), ((0, 8), None)]
)
def test_rms_norm(shape, group, tier):
    for dtype, weight_dtype, gated in (
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float32, True),
    ):
        x, weight = make(*shape, dtype=dtype), make(shape[-1], dtype=weight_dtype)
        gate = make(*shape, dtype=dtype) if gated else None
        out = ops.rms_norm(x, weight, gate, 1e-5, group)
        assert out.dtype == torch.promote_types(dtype, weight_dtype)
        close(out, true_norm(x, weight, gate, group), out.dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("last", [False, True], ids=["gate first", "norm first"])
def test_gates_and_offsets(last, activation, offset, tier):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, gate = make(2, 3, 42, dtype=dtype), make(42, dtype=dtype), make(2, 3, 42, dtype=dtype)
        out = ops.rms_norm(x, weight, gate, 1e-5, 21, last, activation, offset)
        close(out, true_norm(x, weight, gate, 21, last, activation, offset), dtype)
    alone = ops.rms_norm(x, weight, None, 1e-5, None, last, activation, offset)
    close(alone, true_norm(x, weight, None, None, offset=offset), dtype)


def test_rms_norm_takes_any_strides(tier):
    x, gate, weight = make(7, 3, 20).transpose(0, 1), make(3, 7, 46)[..., 3:43:2], make(40)[::2]
    close(ops.rms_norm(x, weight, gate, 1e-5), true_norm(x, weight, gate, None))


def test_opcheck():
    torch.library.opcheck(torch.ops.klfast.rms_norm.default, (make(2, 5, 9), make(9), None, 1e-5, 3, False, False, 0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rms_norm(torch.ones(2, 9), torch.ones(9), group_size=4), "group_size"),
        (lambda: ops.rms_norm(torch.ones(2, 9), torch.ones(())), r"weight must be \[9\]"),
        (lambda: ops.rms_norm(torch.ones(9), torch.ones(9), gate_activation="relu"), '"silu" or "sigmoid", got .relu'),
        (lambda: ops.rms_norm(torch.ones(6, 4), torch.ones(4), torch.ones(2, 3, 4)), r"gate must be like x, \[6, 4\]"),
        (lambda: ops.rms_norm(torch.ones(4), torch.ones(4), torch.ones(())), r"gate must be like x, \[4\], got \[\]"),
        (lambda: ops.rms_norm(torch.ones(2, 0), torch.ones(0)), "must have channels"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
