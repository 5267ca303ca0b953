"""Layers and mixers prepared for the extension: the results of the ops, and never those of weights that are gone."""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from families import batch, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import klfast
from klfast import ops, prepared
from klfast.errors import InvalidInputError
from klfast.models import mamba_step
from klfast.models.hymba import HymbaCache
from klfast.models.hymba.norm import HymbaRMSNorm
from klfast.nn import QuantLinear
from klfast.types import QuantSpec

SPECS = [QuantSpec(4, 32), QuantSpec(4, 64, symmetric=False), QuantSpec(8, -1), QuantSpec(8, 48, symmetric=False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def quantized(spec=SPECS[0], n=21, k=100, bias=True, activation="exact"):
    return QuantLinear.from_linear(nn.Linear(k, n, bias), spec, activation)


def by_op(layer, x):
    return ops.dequant_matmul(x, layer.quantized, layer.bias, activation=layer.activation)


def is_taken(layer, x):
    return prepared.linear(layer, x) is not None


# Linear layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["exact", "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 5, 100), (33, 100)])
def test_quantized_layer_gives_what_its_op_gives(shape, spec, bias, activation, tier):
    layer = quantized(spec, bias=bias, activation=activation)
    for dtype in DTYPES:
        x = torch.randn(shape).to(dtype)
        assert is_taken(layer, x) == (tier != "reference")
        assert torch.equal(layer(x), by_op(layer, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dense_layer_gives_what_its_op_gives(dtype, bias, tier):
    layer, x = nn.Linear(100, 21, bias).to(dtype), torch.randn(3, 100).to(dtype)
    found = prepared.linear(layer, x)
    assert (found is None) == (tier == "reference")
    if found is not None:
        assert torch.equal(found, ops.linear(x, layer.weight, layer.bias))


def test_what_is_left_to_the_op():
    layer, dense = quantized(), nn.Linear(100, 21)
    assert not is_taken(dense, torch.randn(1, 100))  # torch is faster
    assert not is_taken(dense.bfloat16(), torch.randn(9, 100).bfloat16())
    assert not is_taken(dense, torch.randn(1, 100))  # another dtype
    assert not is_taken(layer, torch.randn(0, 100))
    assert not is_taken(layer, torch.randn(100, 3).T)
    assert not is_taken(layer, torch.randn(3, 100).double())
    for wrong in (torch.randn(3, 99), torch.randn(()), torch.ones(3, 100).long()):
        with pytest.raises(InvalidInputError):
            layer(wrong)
    assert layer(torch.randn(0, 100)).shape == (0, 21)


CHANGES = {
    "buffer": lambda layer: setattr(layer, "weight_scale", layer.weight_scale * 2),
    "data": lambda layer: setattr(layer.weight_packed, "data", layer.weight_packed ^ 0x11111111),
    "in place": lambda layer: layer.weight_packed.bitwise_xor_(0x11111111),
    "bias": lambda layer: setattr(layer.bias, "data", layer.bias.data + 1),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "bias type": lambda layer: layer.to(torch.bfloat16),
    "activation": lambda layer: setattr(layer, "activation", "int8"),
    "state dict": lambda layer: layer.load_state_dict(quantized(bias=True).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layer_is_seen(change):
    layer, x = quantized(), torch.randn(2, 100)
    before = layer(x)
    CHANGES[change](layer)
    found = layer(x)
    assert torch.equal(found, by_op(layer, x))
    assert change == "bias type" or not torch.equal(found, before)


def test_other_memory_under_the_same_tensor_is_seen():
    layer, x = nn.Linear(64, 8, bias=False).bfloat16(), torch.randn(1, 64).bfloat16()
    first, second = layer.weight.data, layer.weight.data + 1  # both alive, so that only the address tells
    layer.weight.data = second
    found = prepared.linear(layer, x)
    layer.weight.data = first
    assert not torch.equal(prepared.linear(layer, x), found)


def test_address_used_anew_is_seen():
    """The same tensor object at the same address, other values in between: the address alone would say that nothing changed."""
    layer, again = nn.Linear(64, 8, bias=False).bfloat16(), 0
    prepared.linear(layer, torch.randn(1, 64).bfloat16())
    for n, k in [(8, 64), (4, 128)] * 20:
        address = layer.weight.data_ptr()
        for _ in range(2):  # the first takes other memory, the second that which the first gave back
            layer.weight.data = torch.randn(n, k).bfloat16()
        layer.out_features, layer.in_features = n, k
        x = torch.randn(1, k).bfloat16()
        assert torch.equal(prepared.linear(layer, x), ops.linear(x, layer.weight))
        again += layer.weight.data_ptr() == address
    assert again  # it did happen


@pytest.mark.parametrize("view", [torch.t, lambda weight: weight[:32]], ids=["transposed", "cut"])
def test_another_view_of_the_same_memory_is_seen(view):
    layer, x = nn.Linear(64, 64, bias=False).bfloat16(), torch.randn(1, 64).bfloat16()
    assert is_taken(layer, x)
    layer.weight.data = view(layer.weight.data)
    assert not is_taken(layer, x)


@pytest.mark.parametrize("make", [quantized, lambda: nn.Linear(100, 21).bfloat16()])
def test_bias_that_is_no_parameter_is_left_to_the_op(make):
    """As torch.nn.utils.prune leaves it: an attribute."""
    layer = make()
    x = torch.randn(1, 100).to(layer.bias.dtype)
    assert is_taken(layer, x)
    bias = layer.bias.data
    del layer.bias
    layer.bias = bias
    assert not is_taken(layer, x)


def test_damaged_buffers_are_refused():
    layer, x = quantized(), torch.randn(1, 100)
    layer(x)
    layer.weight_packed = layer.weight_packed[:-1]
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="packed must have shape"):
            layer(x)


def test_layer_is_copied_pickled_and_freed():
    layer, x = quantized(), torch.randn(1, 100)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    storage, alive = weakref.ref(layer.weight_packed), weakref.ref(layer)
    layer.to("meta")
    assert storage() is None
    del layer
    gc.collect()
    assert alive() is None


# Who looks on ------------------------------------------------------------------------------------------------------


def test_what_is_observed_goes_through_the_op():
    layer, x = quantized(), torch.randn(2, 100)
    with torch.autograd.profiler.profile() as seen:
        layer(x)
    assert "klfast::dequant_matmul" in {event.name for event in seen.function_events}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not is_taken(layer, mode.from_tensor(x))
        assert type(layer(mode.from_tensor(x))) is not torch.Tensor
    taken = []
    torch.vmap(lambda row: (taken.append(is_taken(layer, row)), row)[1])(x)
    assert taken == [False]
    with klfast.using("reference"):
        assert not is_taken(layer, x)
    with FlopCounterMode(display=False):
        assert not is_taken(layer, x)
    with torch.inference_mode(False), torch.enable_grad():
        assert not is_taken(layer, torch.randn(2, 100, requires_grad=True))
    assert is_taken(layer, x)


# One token through a mixer -----------------------------------------------------------------------------------------

FAMILIES = ("mamba", "falcon_mamba", "hymba")


class Steps:
    """Counts the steps that were prepared, or lets none be."""

    def __init__(self, monkeypatch):
        self.taken, self.allowed, prepare = 0, True, mamba_step.prepare

        def counted(*args):
            step = prepare(*args) if self.allowed else None
            self.taken += step is not None
            return step

        monkeypatch.setattr(mamba_step, "prepare", counted)


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


def decoded(model, rows, tokens=6):
    """Logits [B, tokens, V], the first from a prompt of 5 and then token by token, and the cache after them."""
    ids = batch(rows, 5 + tokens - 1)
    output = model(ids[:, :5], use_cache=True)
    logits = [output.logits[:, -1:]]
    name = "cache_params" if hasattr(output, "cache_params") else "past_key_values"
    for token in ids[:, 5:].split(1, dim=1):
        output = model(token, use_cache=True, **{name: getattr(output, name)})
        logits.append(output.logits)
    return torch.cat(logits, dim=1).float(), getattr(output, name)


def model_of(family, precision):
    model = tiny(family).to(torch.float32 if precision == "float32" else torch.bfloat16)
    if precision == "int4":
        klfast.quantize_model(model, klfast.Plan({name: QuantSpec(4, 32) for name in klfast.models.layers.linears(model)}, "uniform"))
    return klfast.accelerate(model)


def states(cache):
    if isinstance(cache, HymbaCache):
        return [t for layer in cache.layers for t in (layer.conv, layer.ssm)]
    return [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_gives_what_the_ops_give(family, precision, rows, steps, tier):
    model = model_of(family, precision)
    found, cache = decoded(model, rows)
    assert steps.taken == (0 if tier == "reference" else 5 * model.config.num_hidden_layers)
    steps.allowed = False
    expected, expected_cache = decoded(model, rows)
    # Nothing but exp(A_log) is computed another way; where that moves a value across a rounding to bfloat16, one unit shows.
    tolerance = dict(rtol=1e-5, atol=1e-5) if precision == "float32" else dict(rtol=0, atol=0.02 * expected.abs().max().item())
    torch.testing.assert_close(found, expected, **tolerance)
    for ours, theirs in zip(states(cache), states(expected_cache), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), **({**tolerance, "atol": 0.02 * theirs.float().abs().max().item()} if tolerance["rtol"] == 0 else tolerance))


@pytest.mark.parametrize("part", ["A_log", "conv1d.bias", ".D", "layernorm.weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_changed_mixer_is_seen(family, part, steps):
    model = model_of(family, "float32")
    before, _ = decoded(model, 1)
    kept = []
    for name, parameter in model.named_parameters():
        if (name + ".").find(part + ".") > 0 and ("mixer" in name or "mamba" in name):
            kept.append(parameter.data)
            parameter.data = parameter.data + 0.5
    found, _ = decoded(model, 1)
    assert steps.taken > 0
    steps.allowed = False
    expected, _ = decoded(model, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not kept or not torch.allclose(found, before, atol=1e-3)


def mixer_of(model):
    return next(module for module in model.modules() if type(module).__name__.endswith("Mixer"))


class Plus(nn.Module):
    def forward(self, x):
        return x + 1


def pruned_bias(mixer):
    mixer.conv1d.bias.data += 1
    prune.identity(mixer.conv1d, "bias")


def other_forward(mixer, wraps=lambda forward: lambda function: function):
    projection = mixer.x_proj[0] if isinstance(mixer.x_proj, nn.ModuleList) else mixer.x_proj
    forward = projection.forward
    projection.forward = wraps(forward)(lambda x: 1 + forward(x))


MIXER_CHANGES = {
    "pruned bias": pruned_bias,
    "parametrized bias": lambda mixer: parametrize.register_parametrization(mixer.conv1d, "bias", Plus()),
    "other forward": other_forward,
    "wrapped forward": lambda mixer: other_forward(mixer, functools.wraps),
}
HYMBA_CHANGES = {
    "norm": lambda mixer: setattr(mixer, "B_layernorm", HymbaRMSNorm(16, 1.0)),
    "kind of norm": lambda mixer: setattr(mixer, "dt_layernorm", nn.Identity()),
    "hook on a norm": lambda mixer: mixer.C_layernorm.register_forward_hook(lambda norm, args, y: 2 * y),
    "A_log": lambda mixer: setattr(mixer, "A_log", nn.ParameterList([mixer.A_log[0] + 1])),
    "D": lambda mixer: setattr(mixer, "D", nn.ParameterList([mixer.D[0] + 1])),
}


@pytest.mark.parametrize(
    ("family", "change"),
    [(family, change) for family in FAMILIES for change in MIXER_CHANGES] + [("hymba", change) for change in HYMBA_CHANGES],
)
def test_mixer_changed_after_a_step(family, change, steps):
    """What the ops' path would see."""
    model = model_of(family, "float32")
    before, _ = decoded(model, 1)
    assert steps.taken
    {**MIXER_CHANGES, **HYMBA_CHANGES}[change](mixer_of(model))
    found, _ = decoded(model, 1)
    steps.allowed = False
    expected, _ = decoded(model, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_and_hooks_on_all_modules_are_left_to_the_ops(family, steps):
    model = model_of(family, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        decoded(model, 1)
    assert not steps.taken
    projection, seen = mixer_of(model).x_proj, []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        decoded(model, 1)
    finally:
        hook.remove()
    assert seen.count(projection[0] if family == "hymba" else projection) == 6 and not steps.taken


def test_what_a_step_cannot_do_is_left_to_the_ops(steps):
    model = model_of("mamba", "float32")
    projection = model.backbone.layers[0].mixer.x_proj
    seen = []
    hook = projection.register_forward_hook(lambda *_: seen.append(1))
    decoded(model, 1)
    assert len(seen) == 6 and steps.taken == 5  # one of two mixers
    hook.remove()
    steps.taken = 0
    decoded(model, prepared.FEW_ROWS + 1)
    assert not steps.taken


@pytest.mark.filterwarnings("ignore::klfast.errors.SlowPathWarning")
def test_no_step_under_gradients(steps):
    with torch.inference_mode(False):
        model = model_of("hymba", "float32")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("A_log" in name and ".2." in name)  # of the last layer alone: what enters it has no gradient
        with torch.no_grad():
            decoded(model, 1)
        assert steps.taken == 15
        with torch.enable_grad():
            found, _ = decoded(model, 1)
        assert steps.taken == 15 and found.requires_grad


def test_first_projection_of_another_width_is_refused(steps):
    model = model_of("mamba", "float32")
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(lambda layer, args, y: y[..., :64] if args[0].shape[1] == 1 else y)
    with pytest.raises(InvalidInputError, match="after the first projection"):
        decoded(model, 1)
