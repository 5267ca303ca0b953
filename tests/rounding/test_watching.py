"""What enters matrices, however a forward multiplies by them."""

import pytest
import torch
from torch import nn

from klfast import ops
from klfast.models.matrices import Matrix
from klfast.rounding.watching import watched


@pytest.mark.parametrize(
    "product",
    [
        lambda layer, x: layer(x),
        lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias),
        lambda layer, x: (layer.weight @ x.transpose(-1, -2)).transpose(-1, -2) + layer.bias,
        lambda layer, x: torch.matmul(layer.weight, x.transpose(-1, -2)).transpose(-1, -2) + layer.bias,
        lambda layer, x: ops.linear(x, layer.weight, layer.bias),
    ],
    ids=["layer", "linear", "@", "matmul", "op"],
)
@torch.no_grad()
def test_the_input_of_a_product_is_seen(product):
    layer, other, x = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(2, 3, 6)
    with watched({"a": Matrix(layer), "b": Matrix(other)}, ()) as seen:
        y = product(layer, x)
    torch.testing.assert_close(y, layer(x))
    assert list(seen.inputs) == ["a"] and torch.equal(seen.inputs["a"], x)


@torch.no_grad()
def test_inputs_of_several_calls_are_joined():
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    with watched({"a": Matrix(layer)}, ()) as seen:
        for some in x.split(2):
            layer(some)
    layer(x)
    assert torch.equal(seen.inputs["a"], x)


@torch.no_grad()
def test_a_forward_is_left_once_its_layers_were_used_as_often_as_asked():
    layer, other, x, after = nn.Linear(6, 4), nn.Linear(6, 4), torch.randn(5, 6), []
    with watched({"a": Matrix(layer), "b": Matrix(other)}, last={"a": 2, "b": 1}) as seen:
        for part in (x, 2 * x, 3 * x):
            layer(part)
            other(part)
            after.append(part)
    assert len(after) == 1 and seen.uses == {"a": 2, "b": 1}
    assert torch.equal(seen.inputs["a"], torch.cat([x, 2 * x])) and torch.equal(seen.inputs["b"], x)
