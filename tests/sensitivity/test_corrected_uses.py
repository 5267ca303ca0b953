"""Rows of one use of fused layers, corrected: measured, planned, quantized, saved and loaded."""

import pytest
import torch
from sweep_models import KL, make, naive, tokens
from tiny_models import batch, tiny
from transformers import AutoModelForCausalLM

import klfast
from klfast.core.errors import InvalidInputError
from klfast.models.linears import row_parts
from klfast.models.matrices import matrices
from klfast.models.sizes import other_bytes, weight_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
INT4, INT8 = klfast.QuantSpec(4, 32), klfast.QuantSpec(8, 32)


def corrected(model, name, use):
    first, end = row_parts(model, name)[use]
    return klfast.QuantSpec(4, 32, corrected=end - first, first_corrected=first)


@pytest.mark.parametrize("family", ["mamba2", "mamba", "qwen3_5"])
@torch.no_grad()
def test_measures_layers_with_the_rows_of_one_use_corrected(family):
    model, ids = make(family), tokens()
    fused = [name for name in matrices(model) if row_parts(model, name)]
    uses = dict.fromkeys(use for name in fused for use in row_parts(model, name))
    found = klfast.sweep(model, ids, [INT4, INT8], layers=fused, corrected=[*uses]).measurements
    finer = {(name, corrected(model, name, use)) for name in fused for use in row_parts(model, name)}
    assert set(found) == {*finer, *((name, spec) for name in fused for spec in (INT4, INT8))}
    for name, spec in finer:
        truth = naive(model, ids, name, spec)[KL].mean().item()
        assert found[name, spec].mean[KL] == pytest.approx(truth, rel=1e-3, abs=1e-9)


def test_one_use_leaves_other_layers_alone():
    model = make("mamba2")
    plain, found = (klfast.sweep(model, tokens(1), "int4-g32-sym", corrected=uses).measurements for uses in ((), "dt"))
    added = set(found) - set(plain)
    assert added == {(name, corrected(model, name, "dt")) for name in matrices(model) if name.endswith("in_proj")}
    assert all(found[key] == plain[key] for key in plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrected": "gate"}, r"none of the layers has rows for 'gate' .*: B, C, dt, x, z\)"),
        ({"layers": "out_proj"}, r"none of the layers has rows for 'dt' .*: none, as no layer is fused\)"),
        ({"corrected": 4}, "corrected must be names of uses of rows, got int"),
        ({"specs": "int8"}, "corrected is for specs of 4 bits, and there is none"),
        ({"budget": "adaptive"}, 'rows, activations and corrected need budget="exhaustive"'),
    ],
)
def test_what_cannot_be_corrected(change, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        klfast.sweep(**{"model": make(), "batches": tokens(), "specs": "int4", "corrected": ["dt"], **change})
    assert "\n" not in str(caught.value)


def test_experts_are_not_corrected():
    with pytest.raises(InvalidInputError, match="none of the layers has rows for 'expert 0'"):
        klfast.sweep(make("granite_hybrid_moe"), tokens(1), "int4", corrected=["expert 0"])


def test_resume_files_of_other_uses_are_refused(tmp_path):
    options = {"layers": ["in_proj"], "resume": tmp_path / "resume.json"}
    klfast.sweep(make(), tokens(1), "int4", **options, corrected="dt")
    for other in ((), "B"):
        with pytest.raises(InvalidInputError, match="a sweep with other corrected"):
            klfast.sweep(make(), tokens(1), "int4", **options, corrected=other)


@torch.no_grad()
def test_planned_saved_and_loaded(tmp_path):
    model, text, name = tiny("mamba2"), batch(4, 16), "backbone.layers.0.mixer.in_proj"
    spec, layer = corrected(model, name, "dt"), model.get_submodule(name)
    first, end = row_parts(model, name)["dt"]
    layer.weight[first:end] *= 8
    swept = klfast.Sensitivities.from_json(
        klfast.sweep(model, text, [INT4, INT8], corrected=["dt", "z"], progress=False).to_json()
    )
    uniform = klfast.plan(swept, method="uniform", spec=INT4)
    shape = swept.layers[name].shape
    budget = uniform.predicted["bytes"] + spec.nbytes(shape) - INT4.nbytes(shape)
    plan = klfast.Plan.from_json(klfast.plan(swept, budget).to_json())
    assert plan.specs[name] == spec and set(plan.specs.values()) == {INT4, spec}
    assert not any(one.corrected for one in klfast.plan(swept, 3 * budget, servable=True).specs.values())
    weight = layer.weight.clone()
    klfast.quantize_model(model, plan)
    layer = model.get_submodule(name)
    assert layer.quantized.halves[1].tolist() == list(range(first, end))
    assert torch.equal(
        layer.quantized.dequantize(torch.float32), klfast.quantize(weight, spec).dequantize(torch.float32)
    )
    assert sum(map(weight_bytes, matrices(model).values())) + other_bytes(model) == plan.predicted["bytes"]

    klfast.save_quantized(model, tmp_path / "model")
    for loaded in (klfast.load_quantized(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert loaded.get_submodule(name).spec == layer.spec
        assert torch.equal(loaded.get_submodule(name).quantized.dequantize(), layer.quantized.dequantize())
        torch.testing.assert_close(loaded(batch()).logits, model(batch()).logits, rtol=1e-5, atol=1e-5)


def test_plans_of_rows_beyond_the_matrix_are_refused():
    model, name = tiny("mamba2"), "backbone.layers.0.mixer.in_proj"
    rows = model.get_submodule(name).out_features
    plan = klfast.Plan({name: f"int4-g32-sym+{rows - 1}:{rows + 1}"}, "uniform")
    with pytest.raises(InvalidInputError, match=f"in_proj: 2 rows from {rows - 1} on cannot be corrected in a matrix"):
        klfast.quantize_model(model, plan)
