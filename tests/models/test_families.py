"""The records of families name existing parts, and their families pass through the whole pipeline."""

import copy
import math
import sys

import pytest
import torch
from tiny_models import ACCELERATED, CONFIGS, OTHERS, STATE_SPACE, batch, tiny
from torch import nn

import klfast
from klfast.acceleration.patch import is_accelerated
from klfast.acceleration.transformers_functions import REPLACEMENTS
from klfast.models import families
from klfast.models.families import family_of, mixer_of, norm_of, rows_of
from klfast.models.families.base import split
from klfast.models.linears import linears, row_parts
from klfast.models.matrices import matrices
from klfast.models.sizes import unquantizable

KNOWN = [name for name in CONFIGS if name not in OTHERS]
NEW = [name for name in ACCELERATED if name not in STATE_SPACE]
INT4 = klfast.QuantSpec(4, 32)
KL = "kl_teacher_student"


@pytest.fixture(scope="module")
def known():
    return [tiny(name) for name in KNOWN]


@pytest.mark.parametrize("record", families.FAMILIES, ids=lambda record: record.model_type)
def test_a_record_names_existing_classes_functions_and_blocks(record, known):
    models = [model for model in known if family_of(model) is record]
    classes = {type(module).__name__: module for model in models for module in model.modules()}
    assert models and {*record.mixers, *record.norms, *record.rows} <= set(classes)
    for name, mixer in record.mixers.items():
        assert mixer_of(type(classes[name])) is mixer and set(mixer.functions) <= set(REPLACEMENTS)
        assert mixer.left_weight is None or isinstance(getattr(classes[name], mixer.left_weight), nn.Linear)
    for name in record.norms:
        assert norm_of(type(classes[name]))(classes[name]).weight is classes[name].weight
    for model in models:
        path = record.blocks.path
        assert path is None or isinstance(model.base_model.get_submodule(path), nn.ModuleList)


def test_an_unknown_model_gets_the_generic_record():
    assert family_of(tiny("phi")) is family_of(nn.Linear(2, 2)) is families.GENERIC
    assert mixer_of(nn.Linear) is norm_of(nn.Linear) is None and not rows_of(nn.Linear(2, 2))


def test_a_class_of_the_same_name_elsewhere_is_another_one():
    class MambaMixer(nn.Module):
        pass

    assert mixer_of(MambaMixer) is None and not rows_of(MambaMixer())


# What norms compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ACCELERATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_norms_in_their_shapes_and_dtypes(family, dtype, weight_dtype):
    """Compare each kind of norm, gated if supported, with its own forward in float64 and in its own dtype."""
    model = tiny(family)
    norms = {type(m): m for m in model.modules() if norm_of(type(m)) is not None}
    klfast.accelerate(model)
    for kind, norm in norms.items():
        nn.init.normal_(norm.weight, 1, 0.3)
        norm.to(weight_dtype)
        width = norm.weight.shape[0]
        x, gate = torch.randn(2, 5, width).to(dtype), torch.randn(2, 5, width).to(dtype)
        gated = "gate" in kind.forward.__code__.co_varnames
        always = hasattr(norm, "activation")  # those of delta nets' heads
        for args in [(x,), (x, gate)] if gated and not always else [(x, gate)] if gated else [(x,)]:
            plain, found = kind.forward(norm, *args), norm(*args)
            truth = kind.forward(copy.deepcopy(norm).double(), *(t.double() for t in args))
            assert found.dtype == plain.dtype and found.shape == plain.shape
            errors = [(y.double() - truth).square().mean().sqrt().item() for y in (found, plain)]
            assert errors[0] <= 1.1 * errors[1] + 1e-6


# Uses of rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KNOWN)
def test_the_uses_cover_the_rows(family):
    model = tiny(family)
    parts = {name: row_parts(model, name) for name in linears(model)}
    fused = {name: ranges for name, ranges in parts.items() if ranges}
    assert bool(fused) == bool(family_of(model).rows)
    for name, ranges in fused.items():
        ends = [0, *(end for _, end in ranges.values())]
        assert [first for first, _ in ranges.values()] == ends[:-1], name
        assert ends[-1] == linears(model)[name].out_features, name


def test_split():
    assert split(a=2, b=3) == {"a": (0, 2), "b": (2, 5)} and split() == {}


def mixer_in(model):
    return next(module for module in model.modules() if mixer_of(type(module)) is not None)


SCANS = {  # what arrives there, by the names of uses
    "mamba_selective_scan": ("x", "dt", None, "B", "C"),
    "mamba2_chunk_scan": ("x", "dt", None, "B", "C"),
    "torch_chunk_gated_delta_rule": ("q", "k", "v"),
}
WITH_ROWS = [name for name in ACCELERATED if rows_of(mixer_in(tiny(name)))]


@pytest.mark.parametrize("family", [name for name in WITH_ROWS if not name.startswith("lfm")])
@torch.no_grad()
def test_the_rows_of_a_mixer_do_what_their_names_say(family, monkeypatch):
    """Zeroed rows of a use arrive at the scan as zeros, the others as they were; a closed gate lets nothing out."""
    mixer = mixer_in(tiny(family))
    for layer in mixer.children():
        if getattr(layer, "bias", None) is not None and layer is not getattr(mixer, "dt_proj", None):
            layer.bias.zero_()
    module = sys.modules[type(mixer).__module__]
    name = next(name for name in mixer_of(type(mixer)).functions if name in SCANS)
    seen, real = {}, getattr(module, name)

    def scan(*args, **kwargs):
        seen.update({use: given for use, given in zip(SCANS[name], args, strict=False) if use})
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, scan)
    hidden = torch.randn(2, 7, 64)

    def run(layer, use=None):
        changed = copy.deepcopy(mixer)
        if use is not None:
            getattr(changed, layer).weight[slice(*rows_of(mixer)[layer][use])] = 0
        output = changed(hidden_states=hidden)
        return output, dict(seen)

    for layer, uses in rows_of(mixer).items():
        whole, before = run(layer)
        assert whole.abs().max() > 1e-2
        for use in uses:
            output, after = run(layer, use)
            if use == "z":
                assert output.abs().max() == 0 and all(torch.equal(after[one], before[one]) for one in before)
                continue
            assert after[use].abs().max() == 0 < before[use].abs().max()
            if not (layer == "in_proj" and hasattr(mixer, "x_proj")):  # from whose output dt, B and C are made
                assert all(torch.equal(after[one], before[one]) for one in before if one != use)


@pytest.mark.parametrize("family", [name for name in WITH_ROWS if name.startswith("lfm")])
@torch.no_grad()
def test_the_rows_of_a_short_convolution_do_what_their_names_say(family, monkeypatch):
    """The convolution sees B x, its result is multiplied by C."""
    mixer, hidden = mixer_in(tiny(family)), torch.randn(2, 7, 64)
    module, seen = sys.modules[type(mixer).__module__], []
    real = module.causal_conv1d_fn
    monkeypatch.setattr(
        module, "causal_conv1d_fn", lambda x, *args, **kwargs: seen.append(x) or real(x, *args, **kwargs)
    )
    assert mixer(hidden).abs().max() > 1e-2
    for use, rows in rows_of(mixer)["in_proj"].items():
        changed = copy.deepcopy(mixer)
        changed.in_proj.weight[slice(*rows)] = 0
        assert changed(hidden).abs().max() == 0
        assert torch.equal(seen[-1], seen[0]) if use == "C" else seen[-1].abs().max() == 0


@pytest.mark.parametrize("family", ["granite_hybrid", "granite_hybrid_moe"])
@torch.no_grad()
def test_the_rows_of_granites_mlp_do_what_their_names_say(family):
    mlp = next(module for module in tiny(family).modules() if type(module).__name__ == "GraniteMoeHybridMLP")
    ranges, hidden = rows_of(mlp)["input_linear"], torch.randn(2, 64)
    linear = copy.deepcopy(mlp)
    linear.input_linear.weight[slice(*ranges["up"])] *= -2  # the gate's activation is not linear
    torch.testing.assert_close(linear(hidden), -2 * mlp(hidden))


# The pipeline -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *((family, False) for family in NEW),
        *((family, True) for family in ("granite_hybrid", "lfm2", "qwen3_5", "zamba2")),
    ],
)
@torch.no_grad()
def test_from_sweep_to_generated_text(family, tied, tmp_path, one_thread):
    model, text = tiny(family, tied), batch(4, 24)
    plain = copy.deepcopy(model)
    found = klfast.sweep(model, text, [INT4, "int8-channel-sym"], rows=True, progress=False)
    assert {name for name, _ in found.measurements} == set(matrices(model))
    assert {(name, use) for name, use, _ in found.rows} == {
        (name, use) for name in matrices(model) for use in row_parts(model, name)
    }
    for (_, spec), measured in found.measurements.items():
        if spec == INT4:  # the adapters of a Zamba2 whose blocks are not tied are not all used
            assert measured.below_noise is (measured.mean[KL] == 0)

    plan = klfast.plan(found, mean_bits=6.5)
    assert len({str(spec) for spec in plan.specs.values()}) > 1, "a mixed plan"
    klfast.quantize_model(model, plan)
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert all(is_accelerated(module) for module in loaded.modules() if mixer_of(type(module)) is not None)
    klfast.accelerate(model)
    assert torch.equal(loaded(text).logits, model(text).logits)

    log_p, log_q = (one(text).logits[:, :-1].double().log_softmax(-1) for one in (plain, loaded))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    evaluated = klfast.evaluate(loaded, text, plain)
    assert evaluated.kl == pytest.approx(expected, rel=1e-4)
    nll = -log_q.gather(-1, text[:, 1:, None]).mean().item()
    assert evaluated.perplexity == pytest.approx(math.exp(nll), rel=1e-5)

    ids = batch(3, 9, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    dense = klfast.unaccelerate(loaded)  # transformers' own functions with the same quantized layers
    for padding in (None, mask):
        by_transformers = dense.generate(ids, attention_mask=padding, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert torch.equal(klfast.generate(klfast.accelerate(loaded), ids, 6, attention_mask=padding), by_transformers)
        klfast.unaccelerate(loaded)


def test_routers_count_as_unquantizable():
    assert unquantizable(tiny("granite_hybrid_moe")) == {"GraniteMoeHybridTopKRouter": 2 * 4 * 64 * 4}
    assert not unquantizable(tiny("granite_hybrid")) and not unquantizable(tiny("falcon_h1"))
