"""explain of a model: whether the native engine runs it, or why not."""

from tiny_models import tiny

import klfast
from klfast import Plan, QuantSpec


def test_a_model_that_the_engine_runs():
    model = tiny("mamba")
    found = klfast.explain(model)
    assert found.engine and not found.reason
    assert str(found).splitlines()[0] == "the native engine runs the model"
    assert {"backbone.layers.1.mixer.x_proj", "lm_head"} <= found.layers.keys()


def test_a_model_that_it_does_not_run():
    model = tiny("mamba")
    klfast.quantize_model(model, Plan({"lm_head": QuantSpec.of("int4-g16-sym")}, "uniform"))
    mixer = model.backbone.layers[0].mixer
    mixer.in_proj.register_forward_hook(lambda *_: None)
    found = klfast.explain(model)
    assert not found.engine and found.reason == "backbone.layers.0.mixer.in_proj has hooks"
    assert found.layers["backbone.layers.0.mixer"] == "transformers' own functions"
    assert found.layers["backbone.layers.1.mixer.x_proj"] == "torch"
    assert found.layers["lm_head"] == "klfast's kernels"
    klfast.accelerate(model)
    assert klfast.explain(model).layers["backbone.layers.1.mixer"] == "klfast's kernels"
