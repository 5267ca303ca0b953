"""The weight of a quantized layer is read-only for functions, operators, attributes and views."""

import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from klfast import InvalidInputError, QuantLinear, QuantSpec
from klfast.nn import QuantEmbedding

X = torch.ones(16, 16)


@pytest.fixture(params=[False, True], ids=["", "inference"])
def layer(request):
    with torch.inference_mode(request.param):
        yield QuantLinear.from_linear(nn.Linear(16, 16), QuantSpec(4, 8))


def assigned(name, value):
    return lambda w: setattr(w, name, value)


WRITES = {
    **{
        f"i{name}": lambda w, name=name: getattr(operator, f"i{name}")(w, 2)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    },
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(X),
    "zero_": lambda w: w.zero_(),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), X[:1]),
    "torch.clamp_": lambda w: torch.clamp_(w, 0, 1),
    "set_": lambda w: w.set_(X),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "init.normal_": nn.init.normal_,
    "init.xavier_uniform_": nn.init.xavier_uniform_,
    "init.constant_": lambda w: nn.init.constant_(w, 1),
    "out": lambda w: torch.add(X, 1, out=w),
    "one of out": lambda w: torch.frexp(X, out=(w, X.int())),
    "setitem": lambda w: operator.setitem(w, 0, 1),
    "masked": lambda w: operator.setitem(w, w > 0, 0),
    ".data": assigned("data", X),
    ".grad": assigned("grad", X),
    ".requires_grad": assigned("requires_grad", True),
    "requires_grad_": lambda w: w.requires_grad_(),
    ".data.mul_": lambda w: w.data.mul_(2),
    ".data[:]": lambda w: operator.setitem(w.data, slice(None), 1),
    "detach": lambda w: w.detach().add_(1),
    "transposed": lambda w: w.T.div_(2),
    "row": lambda w: w[0].mul_(2),
    "rows": lambda w: operator.setitem(w[:3], 0, 1),
    "view of a view": lambda w: w.view(-1)[3:].zero_(),
    "chunk": lambda w: w.chunk(2)[0].add_(1),
    "same dtype": lambda w: w.to(torch.float32).add_(1),
    "relu(inplace)": lambda w: F.relu(w, inplace=True),
    "dropout(inplace)": lambda w: F.dropout(w, 0.5, True, True),
    "embedding(max_norm)": lambda w: F.embedding(torch.tensor([0]), w, max_norm=0.1),
    "aten": lambda w: torch.ops.aten.mul_.Tensor(w, X),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_raises(name, layer):
    before = layer(X)
    with pytest.raises(InvalidInputError, match="the weight of a quantized layer is read-only") as error:
        WRITES[name](layer.weight)
    assert "\n" not in str(error.value)
    assert torch.equal(layer(X), before)


@pytest.mark.parametrize(
    "make", [QuantLinear.from_linear, lambda linear, spec: QuantEmbedding(QuantLinear.from_linear(linear, spec))]
)
@pytest.mark.parametrize("value", [X, nn.Parameter(X)], ids=["tensor", "parameter"])
def test_assigning_another_weight_raises(value, make):
    with pytest.raises(InvalidInputError, match="weight: the weight of a quantized layer is read-only"):
        make(nn.Linear(16, 16), QuantSpec()).weight = value


def test_arrays_are_read_only(layer):
    for array in (layer.weight.numpy(), np.asarray(layer.weight)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


READS = {
    "sum": lambda w: w + 0,
    "copied from": lambda w: torch.empty(16, 16).copy_(w),
    "added": lambda w: torch.zeros(16, 16).add_(w),
    "clone": lambda w: w.clone().mul_(2) / 2,
    "another dtype": lambda w: w.double().mul_(2).float() / 2,
    "rows": lambda w: torch.stack([row * 1 for row in w]),
    "product": lambda w: torch.eye(16) @ w.T.T,
    "linear by name": lambda w: F.linear(input=torch.eye(16), weight=w).T,
    "frozen": lambda w: w.requires_grad_(False) + 0,
    "numpy": lambda w: torch.tensor(w.numpy()),
    "vmap": lambda w: torch.func.vmap(lambda row: w.T @ row)(torch.eye(16)),
}


@pytest.mark.parametrize("name", READS)
def test_reading_does_not_raise(name, layer):
    found = READS[name](layer.weight)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, layer.quantized.dequantize(torch.float32))
    layer.weight.grad = None
    layer.weight.requires_grad = False


def test_initialisers_of_transformers_leave_it_alone(layer):
    """transformers' _init_weights touches the weights of a model that is being loaded."""
    from transformers import initialization

    for initialise in (initialization.normal_, initialization.kaiming_uniform_, initialization.zeros_):
        initialise(layer.weight)
