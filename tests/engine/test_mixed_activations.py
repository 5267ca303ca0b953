"""Layers that round their input beside layers that do not, on the engine."""

import pytest
import torch
from tiny_models import batch, tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.generation.engine import engine_of, lower
from klfast.models.activations import exact_activations
from klfast.models.matrices import matrices
from klfast.quant.spec import storable_spec

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("mamba", "mamba2", "qwen3_5", "lfm2", "hymba", "granite_hybrid_moe", "llama")


def mixed(family, folder):
    """Return a model of which every second matrix rounds its input, saved and loaded."""
    model = tiny(family)
    names = list(matrices(model))
    activations = {name: ("int8", "exact")[i % 2] for i, name in enumerate(names)}
    specs = {name: storable_spec(QuantSpec(4, 16), one.shape[1]) for name, one in matrices(model).items()}
    plan = Plan(specs, "uniform", activations=activations)
    plan.to_json(folder / "plan.json")
    klfast.save_quantized(klfast.quantize_model(model, Plan.from_json(folder / "plan.json")), folder / "model")
    return klfast.load_quantized(folder / "model"), activations


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_engine_keep_the_activation_of_each_layer(family, tmp_path):
    model, activations = mixed(family, tmp_path)
    assert {name: one.holder.activation for name, one in matrices(model).items()} == activations
    ids, engine = batch(2, 9), lower(model)
    found = engine(ids, engine.state(2))

    def distance():
        return float((model(ids, use_cache=False).logits[:, -1] - found).norm())

    own = distance()
    with exact_activations(model):
        exact = distance()
    for one in matrices(model).values():
        one.holder.activation = "int8"
    assert own < min(exact, distance()) / 3


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_the_models_own_forward(family, tmp_path):
    model, _ = mixed(family, tmp_path)
    assert klfast.explain(model).engine
    ids = batch(1, 9)
    assert torch.equal(
        klfast.generate(model, ids, max_new_tokens=8), model.generate(ids, do_sample=False, max_new_tokens=8)
    )


@torch.inference_mode()
def test_an_engine_follows_a_change_of_activations(tmp_path):
    model, _ = mixed("mamba2", tmp_path)
    engine = engine_of(model)
    with exact_activations(model):
        assert not engine.is_current() and engine_of(model) is not engine
