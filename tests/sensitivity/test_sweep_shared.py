"""Weights that several layers share (Zamba's transformer blocks) are measured once, changed in all their uses."""

import copy
from dataclasses import replace

import pytest
import torch
from sweep_models import KL, assert_same, make, snapshot, tokens

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.linears import linears, row_parts
from klfast.models.matrices import sharers

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = klfast.QuantSpec(4, 32)


@torch.no_grad()
def truth(model, ids, rounded, spec=SPEC):
    """Return the KL in float64 of a model with the weights of the modules ``rounded`` quantized, each on its own."""
    teacher = copy.deepcopy(model).double()
    student = copy.deepcopy(teacher)
    for name in rounded:
        weight = klfast.quantize(model.get_submodule(name).weight, spec).dequantize(torch.float64)
        student.get_submodule(name).weight = torch.nn.Parameter(weight)
    log_p, log_q = (one(ids).logits[:, :-1].log_softmax(-1) for one in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4 * 4 * 2 * 17, 17], ids=["together", "one by one"])
@pytest.mark.parametrize("family", ["zamba", "zamba2", "zamba2_adapters"])
def test_all_uses_change_at_once(family, limit):
    model, ids = make(family, tied=True), tokens(2)
    before = snapshot(model)
    found = klfast.sweep(model, ids, SPEC, max_batch_tokens=limit)
    assert_same(before, snapshot(model))
    shared = [group for group in sharers(model) if len(group) > 1]
    assert len(shared) >= 7 and set(found.layers) == set(linears(model)) == {name for name, _ in found.measurements}
    for group in shared:
        measured, expected = found.measurements[group[0], SPEC].mean[KL], truth(model, ids, group)
        rounding = (expected * found.noise_floor[KL]) ** 0.5
        assert measured == pytest.approx(expected, rel=1e-4, abs=4 * rounding), group[0]
        if "adapter" not in group[0]:
            assert measured != pytest.approx(truth(model, ids, group[:1]), rel=1e-3), "every use counts"


@torch.no_grad()
def test_rows_of_one_use_are_corrected_in_all_layers_that_share_them(tmp_path):
    model, ids = make("zamba2", tied=True), tokens(2)
    (group,) = (names for names in sharers(model) if names[0].endswith("gate_up_proj"))
    weight, (first, end) = model.get_submodule(group[0]).weight, row_parts(model, group[0])["up"]
    spec = replace(SPEC, corrected=end - first, first_corrected=first)
    found = klfast.sweep(model, ids, SPEC, layers="gate_up_proj", corrected="up", progress=False)
    assert set(found.measurements) == {(group[0], SPEC), (group[0], spec)} and len(group) == 2
    measured = found.measurements[group[0], spec].mean[KL]
    assert measured == pytest.approx(truth(model, ids, group, spec), rel=1e-4)
    assert measured != pytest.approx(truth(model, ids, group[:1], spec), rel=1e-2), "every use counts"
    costs = klfast.second_order_costs(model, found, ids, progress=False)
    assert costs.measurements == found.measurements, "shared layers are rounded to nearest"

    klfast.quantize_model(model, klfast.Plan({group[0]: spec}, "uniform"))
    klfast.save_quantized(model, tmp_path / "model")
    for one in (model, klfast.load_quantized(tmp_path / "model")):
        layers = [one.get_submodule(name) for name in group]
        assert layers[0].quantized.packed is layers[1].quantized.packed
        assert layers[1].quantized.halves[1].tolist() == list(range(first, end))
        assert torch.equal(
            layers[1].quantized.dequantize(torch.float32), klfast.quantize(weight, spec).dequantize(torch.float32)
        )


def test_a_weight_shared_beyond_the_blocks_is_refused():
    model = make("llama")
    for name in ("layers.1.mlp.down_proj", "layers.1.mlp.gate_proj"):
        model.extra = model.model.get_submodule(name)
        with pytest.raises(InvalidInputError, match=f"model.{name} shares its weight with extra, which lies in no"):
            klfast.sweep(model, tokens(), SPEC)
    klfast.sweep(model, tokens(), SPEC, layers="q_proj")
