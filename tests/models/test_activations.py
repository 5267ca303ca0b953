"""Which layers round their input, and doing without for a while."""

import pytest
from tiny_models import tiny

import klfast
from klfast import Plan
from klfast.models.activations import exact_activations, int8_layers
from klfast.models.matrices import matrices, named_matrices


@pytest.mark.parametrize("family", ["mamba2", "granite_hybrid_moe", "zamba2", "gpt2"])
@pytest.mark.filterwarnings("ignore:quantize_model")
def test_counts_each_matrix_once_and_leaves_all_as_they_were(family):
    model = tiny(family, tied=True)
    names = list(matrices(model))
    activations = {name: "int8" if i % 3 else "exact" for i, name in enumerate(names)}
    klfast.quantize_model(model, Plan(dict.fromkeys(names, "int8-g32-sym"), "uniform", activations=activations))
    expected = [name for name in names if activations[name] == "int8"]
    assert int8_layers(model) == expected and expected
    before = {name: one.holder.activation for name, one in named_matrices(model).items()}
    with exact_activations(model):
        assert {one.holder.activation for one in named_matrices(model).values()} == {"exact"}
        assert not int8_layers(model)
    assert {name: one.holder.activation for name, one in named_matrices(model).items()} == before


def test_a_model_without_quantized_layers_has_none():
    assert not int8_layers(tiny("mamba2"))
