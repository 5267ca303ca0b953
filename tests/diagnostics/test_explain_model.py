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


def test_layers_that_round_their_input():
    model = tiny("granite_hybrid_moe")
    experts, head = "model.layers.0.block_sparse_moe.experts", "lm_head"
    specs = dict.fromkeys((f"{experts}.gate_up_proj", f"{experts}.down_proj", head), "int8-g32-sym")
    activations = {f"{experts}.down_proj": "int8"}
    klfast.quantize_model(model, Plan(specs, "uniform", activations=activations))
    found = klfast.explain(model).layers
    rounding = {name for name, what in found.items() if what == "a native instruction, int8 activations"}
    assert rounding and all("down_proj" in name for name in rounding) and head in found
    model.register_forward_hook(lambda *_: None)
    found = klfast.explain(model).layers
    assert found[f"{experts}.down_proj"] == found[experts] == "klfast's kernels, int8 activations"
    assert found[f"{experts}.gate_up_proj"] == found[head] == "klfast's kernels"
