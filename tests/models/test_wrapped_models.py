"""Models in the wrappers of torch.compile and of peft, on which the tests do not depend."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import batch, tiny

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.adapters import unwrapped
from klfast.models.linears import linears
from klfast.planning.plan_file import Plan


class PeftModel(torch.nn.Module):
    """As peft 0.21's: the model is ``base_model.model``, and other attributes are the model's."""

    __module__ = "peft.peft_model"

    def __init__(self, model, **config):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model
        self.active_peft_config = SimpleNamespace(**config)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)


class Adapter(torch.nn.Module):
    """As peft's: a layer with something beside it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, hidden):
        return self.base_layer(hidden) * 1.5


def adapted():
    model = tiny("mamba2")
    mixer = model.backbone.layers[0].mixer
    mixer.out_proj = Adapter(mixer.out_proj)
    return model


WRAPPERS = {"compile": torch.compile, "peft": PeftModel, "both": lambda model: torch.compile(PeftModel(model))}


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("make", [lambda: tiny("mamba2"), adapted], ids=["plain", "adapted"])
def test_the_model_inside_runs_with_its_adapters(make, wrapper, tmp_path):
    model, ids = make(), batch()
    wrapped = wrapper(model)
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(klfast.generate(wrapped, ids, 5), wanted)
    assert klfast.evaluate(wrapped, ids).nll == klfast.evaluate(model, ids, teacher=wrapped).nll
    found = klfast.explain(wrapped)
    assert found == klfast.explain(model)
    if found.engine:
        engine = klfast.lower(wrapped)
        engine(ids, state := engine.state(len(ids)))
        klfast.save_state(tmp_path / "state", state, wrapped)
        assert torch.equal(klfast.load_state(tmp_path / "state", model).seen, state.seen)


def test_adapters_change_the_text():
    """Else the test above would show nothing of them."""
    ids = batch()
    assert not torch.equal(klfast.generate(adapted(), ids, 5), klfast.generate(tiny("mamba2"), ids, 5))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"is_prompt_learning": True}, "puts learned tokens in front of each text"),
        ({"alora_invocation_tokens": [3]}, "begins to adapt at certain tokens"),
        ({"peft_type": SimpleNamespace(value="XLORA")}, "mixes adapters"),
    ],
)
def test_wrappers_that_do_more_than_call_the_model_are_refused(config, why):
    with pytest.raises(InvalidInputError, match=f"PeftModel is peft's wrapper of a model, and {why}"):
        klfast.generate(PeftModel(tiny("mamba2"), **config), batch(), 1)


def test_a_compiled_model_is_swept_and_quantized_under_the_models_own_names():
    model = tiny("mamba2")
    compiled = torch.compile(model)
    found = klfast.sweep(compiled, batch(), specs="int8-g16-sym", layers="in_proj", progress=False)
    plan = klfast.plan(found, method="uniform", spec="int8-g16-sym")
    assert set(plan.specs) == set(linears(model))
    assert klfast.quantize_model(compiled, plan) is compiled
    assert isinstance(model.backbone.layers[0].mixer.in_proj, klfast.QuantLinear)


def test_a_class_of_pefts_without_get_base_model_is_refused():
    wrapper = type("PeftMixedModel", (torch.nn.Module,), {"__module__": "peft.mixed_model"})()
    with pytest.raises(InvalidInputError, match="PeftMixedModel is peft's wrapper"):
        unwrapped(wrapper)
    with pytest.raises(InvalidInputError, match="PeftModel is peft's wrapper"):
        klfast.quantize_model(PeftModel(tiny("mamba2")), Plan({}, "uniform"))
