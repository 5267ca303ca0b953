"""A layer that another thread changes: a call uses its old or its new tensors, never freed memory."""

import itertools

import meanwhile
import pytest
import torch
import transformers
from torch import nn

from klfast import QuantLinear, QuantSpec, ops
from klfast.nn import direct_call, mamba_step


def replace(home, name, tensor):
    home[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(home[name], nn.Parameter) else tensor


def other_memory(home, name, tensor):
    home[name].data = tensor


def wrong_results(home, name, values, change, call):
    """Return how many calls matched none of ``values`` while another thread changes them."""
    expected = []
    for value in values:
        change(home, name, value.clone())
        expected.append(call())

    def change_all(i):
        change(home, name, values[i % len(values)].clone())
        torch.full_like(values[0], -1)  # in the freed memory

    found = [one for one in meanwhile.results(call, change_all) if one is not None]
    assert len(found) > 10
    return sum(not any(torch.equal(one, other) for other in expected) for one in found)


@pytest.mark.parametrize("change", [replace, other_memory])
def test_quantized_layer(change, one_thread):
    first, second = (QuantLinear.from_linear(nn.Linear(512, 512), QuantSpec(8, 64)) for _ in range(2))
    x = torch.randn(1, 512)
    with torch.no_grad():
        values = (first.weight_packed, second.weight_packed)
        assert not wrong_results(first._buffers, "weight_packed", values, change, lambda: direct_call.linear(first, x))


@pytest.mark.parametrize("change", [replace, other_memory])
def test_dense_layer(change, one_thread):
    layer, x = nn.Linear(512, 512).bfloat16(), torch.randn(1, 512).bfloat16()
    values = [torch.randn(512, 512).bfloat16() for _ in range(2)]
    with torch.no_grad():
        assert not wrong_results(layer._parameters, "weight", values, change, lambda: direct_call.linear(layer, x))


@pytest.mark.parametrize("part", ["x_proj", "A_log"])
def test_mamba_step(part, one_thread):
    config = transformers.MambaConfig(vocab_size=16, hidden_size=512, num_hidden_layers=1, state_size=16)
    mixer = transformers.MambaForCausalLM(config).backbone.layers[0].mixer.requires_grad_(False)
    own = mixer._parameters
    parts = mamba_step.Parts(mixer.conv1d, mixer.x_proj, mixer.dt_proj, (own, "A_log"), (own, "D"))
    hidden, x, z = torch.randn(1, 1, 512), torch.randn(1, 1024), torch.randn(1, 1024)
    states = torch.randn(1, 1024, 4), torch.randn(1, 1024, 16)

    def call():
        conv_state, ssm_state = (t.clone() for t in states)
        step = mamba_step.prepare(mixer, parts, hidden, conv_state, ssm_state)
        return None if step is None else step(x, z, conv_state, ssm_state)

    home, name = (mixer.x_proj._parameters, "weight") if part == "x_proj" else (own, "A_log")
    with torch.no_grad():
        values = [home[name].data, home[name].data * 0.5 + 0.25]
        assert not wrong_results(home, name, values, other_memory, call)


@pytest.mark.parametrize(
    ("op", "shape", "dtype"),
    [
        (lambda x, weight: ops.rms_norm(x, weight, eps=1e-5), (1 << 18,), torch.float32),
        (ops.linear, (512, 1024), torch.bfloat16),
    ],
    ids=["rms_norm", "linear"],
)
def test_ops(op, shape, dtype, one_thread):
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    x, values = torch.randn(1, shape[-1], dtype=dtype), [torch.randn(shape, dtype=dtype) for _ in range(2)]
    with torch.no_grad():
        assert not wrong_results({"weight": weight}, "weight", values, other_memory, lambda: op(x, weight))


def test_a_layer_whose_dtype_changes_keeps_its_codes(one_thread):
    layer, x = QuantLinear.from_linear(nn.Linear(256, 256, bias=False), "int4-g32-sym"), torch.randn(1, 256)
    layer.weight_scale = layer.weight_scale.float() * 1.001  # which bfloat16 cannot hold
    with torch.no_grad():
        expected = layer(x)
        found = meanwhile.results(lambda: layer(x), lambda i: layer.to((torch.bfloat16, torch.float32)[i % 2]))
        assert all(torch.equal(one, expected) for one in found)


def test_a_call_has_one_activation_mode():
    """Another thread changes the mode between any two looks at it."""

    class Restless(QuantLinear):
        modes = itertools.cycle(["exact", "int8"])
        activation = property(lambda self: next(self.modes), lambda self, mode: None)

    layer = Restless.from_linear(nn.Linear(256, 256), "int4-g32-sym")
    x, steady = torch.randn(1, 256), QuantLinear(layer.quantized, layer.bias)
    for _ in range(3):
        found = direct_call.PreparedLinear(layer)
        steady.activation = found._options[1]
        assert torch.equal(found(x), steady(x))
