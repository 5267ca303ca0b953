"""Candidates that make a NaN or an infinity are named in the result, and all others measured as if they were alone."""

import math

import pytest
import torch
from sweep_models import KL, make, means, tokens

import klfast
from klfast.core.errors import InvalidInputError
from klfast.sensitivity import candidates, merge
from klfast.sensitivity.coverage import measured_note
from klfast.sensitivity.results import Sensitivities

pytestmark = pytest.mark.usefixtures("one_thread")
SPECS = ("int4-g32-sym", "int8-g32-sym")
BROKEN = ["backbone.layers.0.mixer.in_proj as int4-g32-sym", "lm_head as int4-g32-sym"]


@pytest.fixture
def breaking(monkeypatch):
    whole, model = candidates.fake_quantize, make(tied=True)
    weights = [module.weight for module in (model.backbone.layers[0].mixer.in_proj, model.lm_head)]

    def overflowing(weight, spec, **kwargs):
        rounded = whole(weight, spec, **kwargs)
        breaks = spec.bits == 4 and any(torch.equal(weight, one) for one in weights)
        return rounded * math.inf if breaks else rounded

    monkeypatch.setattr(candidates, "fake_quantize", overflowing)
    return model


@pytest.mark.parametrize("vocabulary", ["full", 16])
def test_they_are_named_and_the_others_measured(vocabulary, breaking, monkeypatch, tmp_path):
    how = {"specs": SPECS, "vocabulary": vocabulary, "max_batch_tokens": 4 * 17}
    path = tmp_path / "resume.json"

    def stop(done, total, what):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        klfast.sweep(breaking, tokens(), **how, resume=path, progress=stop)
    found = klfast.sweep(breaking, tokens(), **how, resume=path)
    assert found.provenance["not_finite"] == BROKEN
    assert means(found) == means(klfast.sweep(breaking, tokens(), **how))
    monkeypatch.undo()
    sound = klfast.sweep(breaking, tokens(), **how)
    assert "not_finite" not in sound.provenance
    assert len(found.measurements) == len(sound.measurements) - 2
    for (name, spec), one in found.measurements.items():
        assert one.mean[KL] == pytest.approx(sound.measurements[name, spec].mean[KL], rel=1e-4), (name, spec)


def test_plans_and_reports_say_so(breaking, tmp_path):
    found = klfast.sweep(breaking, tokens(), SPECS)
    found.to_json(tmp_path / "s.json")
    read = Sensitivities.from_json(tmp_path / "s.json")
    note = "in_proj as int4-g32-sym and 1 more left out: the model's outputs become NaN or infinite"
    assert note in measured_note(read)
    made = klfast.plan(read, mean_bits=9)
    assert any(note in one for one in made.notes)
    assert made.specs["lm_head"].bits == made.specs["backbone.layers.0.mixer.in_proj"].bits == 8
    klfast.sweep(breaking, tokens(), "int6-g32-sym").to_json(tmp_path / "other.json")
    assert merge.read([tmp_path / "other.json", tmp_path / "s.json"]).provenance["not_finite"] == BROKEN


def test_an_adaptive_sweep_measures_the_layer_s_next_spec(breaking):
    found = klfast.sweep(breaking, tokens(40, 17), SPECS, budget="adaptive", vocabulary=16)
    assert found.provenance["not_finite"] == BROKEN
    of_layers = {name: one for (name, _), one in found.measurements.items() if any(name in text for text in BROKEN)}
    assert len(of_layers) == 2 and not any(one.is_derived for one in of_layers.values())


def test_a_broken_head_of_the_model_itself_is_an_error():
    model = make()
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), 0.0))
    model.lm_head.bias.data[3] = math.inf
    with pytest.raises(InvalidInputError, match=r"the full-precision model's logits are NaN, infinite or too large"):
        klfast.sweep(model, tokens(), SPECS, layers=["*.0.mixer.in_proj"])
