"""Matrices of a model: stacks of experts beside linear layers, their sizes, fingerprints and row parts."""

import pytest
import torch
from tiny_models import tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.core.errors import ModelMismatchError
from klfast.models import fingerprint, sizes
from klfast.models.linears import linears, row_parts
from klfast.models.matrices import matrices, matrix, sharers
from klfast.sensitivity.results import Sensitivities

UP, DOWN = (f"model.layers.0.block_sparse_moe.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def test_a_stack_is_one_matrix():
    model = tiny("granite_hybrid_moe")
    found = matrices(model)
    assert [name for name in found if ".0." in name and "experts" in name] == [UP, DOWN]
    assert (found[UP].shape, found[DOWN].shape) == ((4 * 2 * 96, 64), (4 * 64, 96))
    experts = model.model.layers[0].block_sparse_moe.experts
    assert torch.equal(found[UP].weight[192:384], experts.gate_up_proj[1])
    assert found[UP].weight.data_ptr() == experts.gate_up_proj.data_ptr(), "a view"
    assert set(linears(model)) == {name for name, one in found.items() if not one.is_stack}
    assert matrix(model, DOWN).holder is experts


@pytest.mark.parametrize("chosen", [[UP, DOWN], [DOWN], [UP]])
def test_sizes_by_hand(chosen):
    """INT4 in groups of 16, asymmetric: half a byte a weight, 2 a scale and half a zero point a group, 16 the shape."""
    model = tiny("granite_hybrid_moe")
    blank = Sensitivities.of(model)
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert blank.layers[UP].float_bytes == 4 * 192 * 64 * 4 and blank.layers[DOWN].float_bytes == 4 * 64 * 96 * 4
    assert sum(info.float_bytes for info in blank.layers.values()) + blank.other_bytes == whole
    spec = QuantSpec(4, 16, False)
    klfast.quantize_model(model, Plan(dict.fromkeys(chosen, spec), "uniform"))
    found = Sensitivities.of(model)
    for name, weights in ((UP, 4 * 192 * 64), (DOWN, 4 * 64 * 96)):
        expected = weights / 2 + weights / 16 * 2.5 + 16 if name in chosen else weights * 4
        assert found.layers[name].float_bytes == expected
        if name in chosen:
            assert spec.saved_bytes(found.layers[name].shape) == expected
    assert list(found.layers) == list(blank.layers) and found.other_bytes == blank.other_bytes
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert sum(info.float_bytes for info in found.layers.values()) + found.other_bytes == stored
    assert sizes.unquantizable(model) == {"GraniteMoeHybridTopKRouter": 2 * 4 * 64 * 4}


def test_a_fingerprint_knows_the_experts():
    model = tiny("granite_hybrid_moe")
    known = fingerprint.fingerprint(model)
    fingerprint.require_match(known, model, "the plan")
    with torch.no_grad():
        model.model.layers[1].block_sparse_moe.experts.down_proj[3] *= 1.2
    with pytest.raises(ModelMismatchError, match="the plan was made for other weights"):
        fingerprint.require_match(known, model, "the plan")


def test_each_expert_has_its_rows():
    parts = row_parts(tiny("granite_hybrid_moe"), DOWN)
    assert parts == {"expert 0": (0, 64), "expert 1": (64, 128), "expert 2": (128, 192), "expert 3": (192, 256)}


def test_experts_that_several_blocks_share():
    """Quantized once, under both names."""
    model = tiny("granite_hybrid_moe")
    first, second = (layer.block_sparse_moe for layer in model.model.layers)
    second.experts = first.experts
    names = [UP, UP.replace(".0.", ".1.")]
    assert names in sharers(model) and names[1] not in matrices(model)
    klfast.quantize_model(model, Plan({names[1]: QuantSpec(4, 16)}, "uniform"))
    assert second.experts is first.experts and matrix(model, UP).is_quantized
    assert not matrix(model, DOWN).is_quantized
