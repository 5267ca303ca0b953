"""QuantLinear as a drop-in nn.Linear."""

import copy

import pytest
import torch
from torch import nn

from klfast import QuantLinear, QuantSpec, dequant_matmul
from klfast.errors import InvalidInputError
from klfast.quantization import fake_quantize, quantize

SPECS = [QuantSpec(4, 32), QuantSpec(8, 64, False), QuantSpec(4, -1, False)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_linear(tier, spec, bias, dtype):
    linear = nn.Linear(100, 48, bias, dtype=dtype)
    layer = QuantLinear.from_linear(linear, spec)
    x = torch.randn(2, 3, 100, dtype=dtype)
    weight = fake_quantize(linear.weight, spec)
    want = nn.functional.linear(x.float(), weight, linear.bias.float() if bias else None)
    torch.testing.assert_close(layer(x), want.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert layer(x).dtype == dtype and not layer(x).requires_grad


@pytest.mark.parametrize("activation", ["exact", "int8"])
def test_forward_is_the_public_op(tier, activation):
    layer = QuantLinear.from_linear(nn.Linear(100, 48), SPECS[1], activation, scale="mse")
    x = torch.randn(5, 100)
    assert torch.equal(layer(x), dequant_matmul(x, layer.quantized, layer.bias, activation=activation))
    assert layer.quantized.nbytes == SPECS[1].nbytes((48, 100))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_state_dict_into_an_empty_layer(spec):
    layer = QuantLinear.from_linear(nn.Linear(100, 48), spec)
    empty = QuantLinear.empty((48, 100), spec, bias_dtype=torch.float32)
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(5, 100)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_torch_compile(spec):
    """No graph break, and the same numbers."""
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(100, 48), spec), nn.SiLU(), QuantLinear.from_linear(nn.Linear(48, 7, False), spec))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in [(100,), (4, 100), (2, 5, 100)]:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_bad_input():
    linear = nn.Linear(100, 48)
    with pytest.raises(InvalidInputError, match="nn.Linear, got Conv1d"):
        QuantLinear.from_linear(nn.Conv1d(3, 3, 3), QuantSpec())
    with pytest.raises(InvalidInputError, match="activation"):
        QuantLinear(quantize(linear.weight, QuantSpec()), activation="fp8")
    layer = QuantLinear.from_linear(linear, QuantSpec())
    with pytest.raises(InvalidInputError, match=r"\[..., 100\]"):
        layer(torch.randn(3, 99))
    with pytest.raises(InvalidInputError, match="float64"):
        layer(torch.randn(3, 100).double())
