"""GPT-2's Conv1D as a linear layer, and its quantized form in the whole pipeline."""

import copy

import pytest
import torch
from sweep_models import KL, assert_same, snapshot
from tiny_models import batch, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.linears import linears
from klfast.models.matrices import matrices
from klfast.models.matrices import matrix as matrix_of
from klfast.models.sizes import other_bytes, unquantizable, weight_bytes
from klfast.nn.conv1d import QuantConv1D, as_linear

SPEC = klfast.QuantSpec(4, 16)


def test_as_linear_shares_the_weight_and_the_bias():
    conv, x = Conv1D(5, 3).eval(), torch.randn(2, 7, 3)
    conv.weight.requires_grad_(False)
    found = as_linear(conv)
    torch.testing.assert_close(found(x), conv(x))
    assert (found.out_features, found.in_features) == tuple(found.weight.shape) == (5, 3)
    assert found.weight.data_ptr() == conv.weight.data_ptr() and found.bias is conv.bias
    assert not found.training and not found.weight.requires_grad and found.bias.requires_grad
    assert as_linear(linear := nn.Linear(2, 2)) is linear


def test_a_conv1d_of_another_module_is_another_one():
    assert not linears(nn.Sequential(nn.Conv1d(2, 2, 1), type("Conv1D", (nn.Module,), {})()))


def test_every_matrix_counts():
    model = tiny("gpt2", tied=True)
    of_block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"transformer.h.{i}.{name}" for i in range(2) for name in of_block]
    assert list(linears(model)) == [*names, "lm_head"] and unquantizable(model) == {}
    assert linears(model)[names[0]].weight.shape == (96, 32)
    size = sum(map(weight_bytes, matrices(model).values())) + other_bytes(model)
    assert size == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_sweep_rounds_each_output_and_leaves_the_model_as_it_was(dtype, one_thread):
    model, ids = tiny("gpt2", dtype=dtype), batch(3, 17)
    before = snapshot(model)
    found = klfast.sweep(model, ids, SPEC)
    assert_same(before, snapshot(model))
    teacher = copy.deepcopy(model).double()
    log_p = teacher(ids).logits[:, :-1].log_softmax(-1)
    for name in linears(model):
        student = copy.deepcopy(teacher)
        layer = student.get_submodule(name)
        matrix = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        matrix.copy_(klfast.quantize(matrix.float(), SPEC).dequantize(torch.float32))
        log_q = student(ids).logits[:, :-1].log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        rounding = (expected * found.noise_floor[KL]) ** 0.5
        assert found.measurements[name, SPEC].mean[KL] == pytest.approx(expected, rel=1e-5, abs=2 * rounding), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_from_plan_to_generated_text(tied, tmp_path):
    model, ids = tiny("gpt2", tied), batch(2, 9)
    biases = {name: layer.bias for name, layer in linears(model).items()}
    left = "transformer.h.1.mlp.c_fc"
    plan = klfast.Plan(dict.fromkeys([name for name in linears(model) if name != left], SPEC), "uniform")
    truth = copy.deepcopy(model).double()
    for name in plan.specs:
        layer = truth.get_submodule(name)
        matrix = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        matrix.copy_(klfast.quantize(matrix_of(model, name).weight, SPEC).dequantize(torch.float32))

    klfast.quantize_model(model, plan)
    layers = linears(model)
    assert all(layer.bias is biases[name] for name, layer in layers.items())
    assert {name for name, layer in layers.items() if isinstance(layer, QuantConv1D)} == set(plan.specs) - {"lm_head"}
    assert isinstance(model.get_submodule(left), Conv1D)
    torch.testing.assert_close(model(ids).logits.double(), truth(ids).logits, rtol=1e-4, atol=1e-4)
    said = "transformer.wte is tied to the quantized head" if tied else "h.0.attn.c_attn is a Conv1D"
    with pytest.raises(InvalidInputError, match=said):
        model.save_pretrained(tmp_path / "model")

    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert [type(loaded.get_submodule(name)) for name in layers] == [type(model.get_submodule(name)) for name in layers]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(klfast.generate(loaded, ids, 8), expected)
    with pytest.raises(InvalidInputError, match="c_attn is quantized already"):
        klfast.quantize_model(loaded, plan)
