"""The fused decoding step of a Mamba mixer: the ops' results, and never with parts that were replaced."""

import functools

import pytest
import torch
from tiny_models import batch, tiny
from torch import nn
from torch.nn.utils import parametrize, prune

import klfast
from klfast.backends import operands
from klfast.core.errors import InvalidInputError
from klfast.models.calling import cache_argument, returned_cache
from klfast.models.hymba import HymbaCache
from klfast.models.hymba.norm import HymbaRMSNorm
from klfast.models.linears import linears
from klfast.nn import mamba_step
from klfast.quant.spec import QuantSpec

FAMILIES = ("mamba", "falcon_mamba", "hymba")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


class Steps:
    """Counts prepared steps, or prevents them."""

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
    """Return logits [B, tokens, V], from a prompt of 5 and then token by token, and the cache after them."""
    ids = batch(rows, 5 + tokens - 1)
    output = model(ids[:, :5], use_cache=True)
    logits = [output.logits[:, -1:]]
    for token in ids[:, 5:].split(1, dim=1):
        output = model(token, use_cache=True, **{cache_argument(model): returned_cache(output)})
        logits.append(output.logits)
    return torch.cat(logits, dim=1).float(), returned_cache(output)


def model_of(family, precision):
    model = tiny(family).to(torch.float32 if precision == "float32" else torch.bfloat16)
    if precision == "int4":
        klfast.quantize_model(model, klfast.Plan({name: QuantSpec(4, 32) for name in linears(model)}, "uniform"))
    return klfast.accelerate(model)


def states(cache):
    if isinstance(cache, HymbaCache):
        return [t for layer in cache.layers for t in (layer.conv, layer.ssm)]
    return [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]


def allowed_error(model, tokens):
    """Return the error of float32 logits relative to the largest: each layer sums rounded terms."""
    config = model.config
    widest = max(layer.in_features for layer in linears(model).values())
    return torch.finfo(torch.float32).eps * config.num_hidden_layers * (widest + tokens)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_equals_the_ops(family, precision, steps, tier):
    model = model_of(family, precision)
    # Only exp(A_log) is computed differently; if that moves a value across a rounding to bfloat16, one ulp differs.
    error = allowed_error(model, 10) if precision == "float32" else 0.02
    for rows in (1, 3):
        steps.taken, steps.allowed = 0, True
        found, cache = decoded(model, rows)
        assert steps.taken == (0 if tier == "reference" else 5 * model.config.num_hidden_layers)
        steps.allowed = False
        expected, expected_cache = decoded(model, rows)
        for ours, theirs in [(found, expected), *zip(states(cache), states(expected_cache), strict=True)]:
            allowed = error * theirs.float().abs().max().item()
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=allowed)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_step_against_float64(family, rows, steps, tier):
    model = model_of(family, "float32")
    found, cache = decoded(model, rows)
    assert steps.taken or tier == "reference"
    truth, true_cache = decoded(tiny(family).double(), rows)
    for ours, true in [(found, truth), *zip(states(cache), states(true_cache), strict=True)]:
        torch.testing.assert_close(
            ours.double(), true.double(), rtol=0, atol=allowed_error(model, 10) * true.abs().max().item()
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_dt_is_never_rounded_to_int8(family, steps, tier):
    """The model's own forward uses dt_proj's weight, not the layer, so its input stays exact in a step, too."""
    model = model_of(family, "float32")
    layers = [name for name in linears(model) if "dt_proj" in name]
    klfast.quantize_model(model, klfast.Plan({name: QuantSpec(8, 32) for name in layers}, "uniform"), activation="int8")
    found, _ = decoded(model, 1)
    assert layers and (steps.taken or tier == "reference")
    steps.allowed = False
    expected, _ = decoded(model, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed_error(model, 10) * expected.abs().max().item())


PARTS = [(family, part) for family in FAMILIES for part in ("A_log", "conv1d.bias", ".D")] + [
    ("hymba", "layernorm.weight")
]


@pytest.mark.parametrize(("family", "part"), PARTS)
def test_changed_mixer_is_seen(family, part, steps):
    model = model_of(family, "float32")
    before, _ = decoded(model, 1)
    changed = [
        p
        for name, p in model.named_parameters()
        if (name + ".").find(part + ".") > 0 and ("mixer" in name or "mamba" in name)
    ]
    for parameter in changed:
        parameter.data = parameter.data + 0.5
    found, _ = decoded(model, 1)
    assert changed and steps.taken > 0
    steps.allowed = False
    expected, _ = decoded(model, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed_error(model, 10) * expected.abs().max().item())
    assert not torch.allclose(found, before, atol=1e-3)


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
    [(family, change) for family in FAMILIES for change in MIXER_CHANGES]
    + [("hymba", change) for change in HYMBA_CHANGES],
)
def test_mixer_changed_after_a_step(family, change, steps):
    """A step notices the changes that the ops would."""
    model = model_of(family, "float32")
    before, _ = decoded(model, 1)
    assert steps.taken
    {**MIXER_CHANGES, **HYMBA_CHANGES}[change](mixer_of(model))
    found, _ = decoded(model, 1)
    steps.allowed = False
    expected, _ = decoded(model, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed_error(model, 10) * expected.abs().max().item())
    assert not torch.allclose(found, before, atol=1e-3)


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


def test_unsupported_inputs_are_left_to_the_ops(steps):
    model = model_of("mamba", "float32")
    projection = model.backbone.layers[0].mixer.x_proj
    seen = []
    hook = projection.register_forward_hook(lambda *_: seen.append(1))
    decoded(model, 1)
    assert len(seen) == 6 and steps.taken == 5  # one of two mixers
    hook.remove()
    steps.taken = 0
    decoded(model, operands.FEW_ROWS + 1)
    assert not steps.taken


@pytest.mark.filterwarnings("ignore::klfast.core.errors.SlowPathWarning")
def test_no_step_under_gradients(steps):
    with torch.inference_mode(False):
        model = model_of("hymba", "float32")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                "A_log" in name and ".2." in name
            )  # only of the last layer, whose input has no gradient
        with torch.no_grad():
            decoded(model, 1)
        assert steps.taken == 15
        with torch.enable_grad():
            found, _ = decoded(model, 1)
        assert steps.taken == 15 and found.requires_grad


def test_first_projection_of_another_width_is_refused(steps):
    model = model_of("mamba", "float32")
    model.backbone.layers[0].mixer.in_proj.register_forward_hook(
        lambda layer, args, y: y[..., :64] if args[0].shape[1] == 1 else y
    )
    with pytest.raises(InvalidInputError, match="after the first projection"):
        decoded(model, 1)
