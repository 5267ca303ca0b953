"""Suffixes by differences from the teacher, in int8."""

import pytest
import torch
from sweep_models import KL, assert_same, make, means, snapshot, tokens
from test_sweep_interrupt import stopped_at
from torch import nn

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.block_chain import Chain
from klfast.sensitivity import candidates, differences, inputs, resume_file
from klfast.sensitivity.differences import Differences

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"max_batch_tokens": 8 * 2 * 17, "progress": False}  # two windows at a time, eight candidates to a batch


@pytest.fixture
def wanted(monkeypatch):
    """Take small layers, too, on any CPU."""
    monkeypatch.setattr(inputs, "why_not", lambda device, dtype: "")
    monkeypatch.setattr(differences, "LEAST_SIDE", 16)


def largest_error(found, exact):
    assert found.measurements.keys() == exact.measurements.keys()
    floor = 100 * exact.noise_floor[KL]
    return max(
        abs(found.measurements[which].mean[KL] / one.mean[KL] - 1)
        for which, one in exact.measurements.items()
        if one.mean[KL] > floor
    )


@pytest.mark.parametrize("name", ["mamba", "mamba2", "hymba"])
def test_kl_of_trained_models(name, wanted):
    model, tokenizer = klfast.load_model(name), klfast.load_tokenizer(name)
    ids = klfast.token_batches("calibration", tokenizer, vocab_size=model.config.vocab_size, length=64, windows=4)
    how = {"layers": "*layers.1.*", "max_batch_tokens": 8 * 4 * 64, "progress": False}
    exact, found = (klfast.sweep(model, ids, suffix=suffix, **how) for suffix in ("exact", "int8"))
    assert found.provenance["suffix"] == "int8" and exact.provenance["suffix"] == "exact"
    assert 0 < largest_error(found, exact) < 5e-3
    assert found.noise_floor == exact.noise_floor


@pytest.mark.parametrize("family", ["qwen3_5", "granite", "zamba", "hymba"])
def test_each_kind_of_layer(family, wanted):
    model = make(family, tied=True)
    before = snapshot(model)
    exact, found = (klfast.sweep(model, tokens(4), suffix=suffix, **OPTIONS) for suffix in ("exact", "int8"))
    assert_same(before, snapshot(model))
    assert 0 < largest_error(found, exact) < 0.05  # few tokens, narrow layers


@torch.no_grad()
def test_products_are_the_teacher_s_and_those_of_differences(wanted):
    torch.manual_seed(0)
    layer = nn.Linear(96, 40)
    of, teacher = Differences([nn.Sequential(layer)]), torch.randn(2, 5, 96)
    with of.noted(0) as products:
        noted = layer(teacher)
        expected = noted.clone()
        noted.zero_()
    moved = torch.cat([teacher, teacher + 1e-4 * torch.randn(2, 5, 96), teacher * 1.01])
    exact, forward = layer(moved).double(), layer.forward
    with of.products(products):
        y = layer(moved)
        for other in (moved[:, 0], moved[:, :4], moved[:3]):  # not what the teacher met: as they are
            assert torch.equal(layer(other), forward(other))
    assert torch.equal(y[:2], expected)
    for part in (slice(2, 4), slice(4, 6)):
        change = (exact[part] - exact[:2]).norm()
        assert 0 < (y[part] - exact[part]).norm() < 0.02 * change


@torch.no_grad()
def test_what_a_block_multiplies_twice_or_by_experts_is_not_noted(wanted):
    first, twice, flat = (nn.Linear(64, 64) for _ in range(3))
    x = torch.randn(2, 5, 64)
    with Differences([nn.ModuleList([first, twice, flat])]).noted(0) as products:
        first(x), twice(x), twice(x + 1), flat(x[0])
    assert products.keys() == {first}
    with Differences([nn.ModuleList([first, flat])]).noted(0) as products:
        first(x), flat(x)
    assert products[first].input is products[flat].input is not x
    with Differences([nn.ModuleList([first, flat])]).noted(0) as products:
        first(x), flat(x.mul_(2))
    assert torch.equal(2 * products[first].input, products[flat].input)


def test_a_killed_sweep_resumes_bit_for_bit(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_file, "_SAVE_SECONDS", -1.0)
    model, ids, path = make("mamba2", tied=True), tokens(3), tmp_path / "r.json"
    how = {**OPTIONS, "vocabulary": 16, "suffix": "int8"}
    whole = klfast.sweep(model, ids, **how)
    blocks = len(Chain(model).blocks)
    assert stopped_at(monkeypatch, 6 * blocks, lambda: klfast.sweep(model, ids, resume=path, **how)) == 6 * blocks
    with pytest.raises(InvalidInputError, match="of a sweep with other suffix"):
        klfast.sweep(model, ids, resume=path, **{**how, "suffix": "exact"})
    assert means(klfast.sweep(model, ids, resume=path, **how)) == means(whole)


def test_what_is_not_finite_stays_so(wanted, monkeypatch):
    model, fake_quantize = make(tied=True), candidates.fake_quantize
    broken = model.backbone.layers[0].mixer.in_proj.weight

    def overflowing(weight, spec, **kwargs):
        rounded = fake_quantize(weight, spec, **kwargs)
        return rounded * torch.inf if spec.bits == 4 and torch.equal(weight, broken) else rounded

    sound = klfast.sweep(model, tokens(), suffix="int8", **OPTIONS)
    monkeypatch.setattr(candidates, "fake_quantize", overflowing)
    found = klfast.sweep(model, tokens(), suffix="int8", **OPTIONS)
    assert found.provenance["not_finite"] == ["backbone.layers.0.mixer.in_proj as int4-g64-sym"]
    for which, one in found.measurements.items():
        assert one.mean[KL] == sound.measurements[which].mean[KL], which


def test_by_default_where_the_vocabulary_is_sampled_and_int8_is_fast(monkeypatch):
    model = make()

    def suffix(**how):
        return klfast.sweep(model, tokens(), "int4", layers="lm_head", **how).provenance["suffix"]

    monkeypatch.setattr(inputs, "why_not", lambda device, dtype: "")
    assert (suffix(), suffix(vocabulary=16), suffix(vocabulary=16, suffix="exact")) == ("exact", "int8", "exact")
    monkeypatch.setattr(inputs, "why_not", lambda device, dtype: "it is slow")
    assert suffix(vocabulary=16) == "exact"


def test_messages():
    def message(**how):
        with pytest.raises(InvalidInputError) as caught:
            klfast.sweep(make(), tokens(), "int4", **how)
        return str(caught.value)

    assert message(suffix="int4") == 'suffix must be "exact" or "int8", got \'int4\''
    with klfast.using("scalar"):
        assert message(suffix="int8") == (
            'suffix="int8" would save no time: this CPU has no fast int8 products (AVX-VNNI, AVX-512-VNNI, AMX)'
        )
    assert message(suffix="int8", dtype=torch.float64) == (
        'suffix="int8" would save no time: the sweep computes in torch.float64'
    )
