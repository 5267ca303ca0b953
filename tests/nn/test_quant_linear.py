"""QuantLinear as a drop-in nn.Linear."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, tiny
from torch import nn

import klfast
from klfast import QuantLinear, QuantSpec, dequant_matmul
from klfast.core.errors import InvalidInputError
from klfast.models.linears import linears
from klfast.nn import QuantEmbedding
from klfast.quant.rounding import fake_quantize, quantize

SPECS = [QuantSpec(4, 32), QuantSpec(6, 32, False), QuantSpec(8, 64, False), QuantSpec(4, -1, False)]


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
    model = nn.Sequential(
        QuantLinear.from_linear(nn.Linear(100, 48), spec),
        nn.SiLU(),
        QuantLinear.from_linear(nn.Linear(48, 7, False), spec),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in [(100,), (4, 100), (2, 5, 100)]:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_bad_input():
    linear = nn.Linear(100, 48)
    with pytest.raises(InvalidInputError, match=r"nn\.Linear, got Conv1d"):
        QuantLinear.from_linear(nn.Conv1d(3, 3, 3), QuantSpec())
    with pytest.raises(InvalidInputError, match="activation"):
        QuantLinear(quantize(linear.weight, QuantSpec()), activation="fp8")
    layer = QuantLinear.from_linear(linear, QuantSpec())
    with pytest.raises(InvalidInputError, match=r"\[..., 100\]"):
        layer(torch.randn(3, 99))
    with pytest.raises(InvalidInputError, match="float64"):
        layer(torch.randn(3, 100).double())
    with pytest.raises(InvalidInputError, match="got QuantLinear"):
        QuantLinear.from_linear(layer, QuantSpec())


@pytest.mark.filterwarnings("ignore::klfast.core.errors.SlowPathWarning")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_float64(spec):
    layer = QuantLinear.from_linear(nn.Linear(100, 48), spec)
    weight, bias, x = (
        layer.quantized.dequantize(torch.float32).double(),
        layer.bias.detach().double(),
        torch.randn(3, 100).double(),
    )
    layer.double()
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F.linear(x, layer.weight), x @ weight.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight @ x.T, weight @ x.T, rtol=1e-12, atol=1e-12)
    layer.float()
    torch.testing.assert_close(layer(x.float()).double(), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::klfast.core.errors.SlowPathWarning")
def test_float64_with_rounded_activations():
    layer = QuantLinear.from_linear(nn.Linear(100, 48), SPECS[1], "int8")
    x = torch.randn(3, 100)
    want = layer(x)
    layer.double()
    wide = x.double().requires_grad_()
    y = layer(wide)
    torch.testing.assert_close(y.float(), want, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), wide)
    torch.testing.assert_close(dx, layer.quantized.dequantize(torch.float32).double().sum(0).expand(3, -1))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("shape", [(48, 40), (41, 38)])
def test_state_dict_of_another_shape(shape, strict):
    """The same numbers of words and groups, but other features: only the shape differs."""
    layer, other = (QuantLinear.from_linear(nn.Linear(k, n, False), QuantSpec(4, -1)) for n, k in ((48, 38), shape))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(
        RuntimeError, match=rf"weight_shape is \[{shape[0]}, {shape[1]}\], but the layer's weight is \[48, 38\]"
    ):
        layer.load_state_dict(other.state_dict(), strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer.load_state_dict(before)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba", "hymba", "llama"])
def test_tie_weights_of_a_tied_quantized_model(family):
    model = tiny(family, tied=True)
    klfast.quantize_model(model, klfast.Plan({name: QuantSpec(4, 32) for name in linears(model)}, "uniform"))
    with torch.no_grad():
        before, names = model(batch()).logits, [name for name, _ in model.named_parameters()]
        model.tie_weights()
        assert torch.equal(model(batch()).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)


def test_embedding_of_an_offloaded_head():
    head = QuantLinear.from_linear(nn.Linear(64, 48, False), QuantSpec())
    embedding = QuantEmbedding(head)
    head.to("meta")
    with pytest.raises(InvalidInputError, match=r"on the meta device.*keep the head's buffers in memory"):
        embedding(torch.tensor([0]))


@pytest.mark.slow
def test_exported_program_in_another_process(tmp_path):
    layer, x = QuantLinear.from_linear(nn.Linear(64, 8), QuantSpec()), torch.ones(2, 64)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    torch.save(layer(x), tmp_path / "y.pt")
    code = (
        "import sys, torch, klfast.ops; m = torch.export.load('layer.pt2').module(); "
        "assert torch.equal(m(torch.ones(2, 64)), torch.load('y.pt'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
