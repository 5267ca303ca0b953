"""Heads with corrected rows: in plans, models, files and transformers' own loader."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import sign
from tiny_models import batch, tiny
from transformers import AutoModelForCausalLM

import klfast
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.matrices import matrices
from klfast.models.sizes import other_bytes, weight_bytes

SPEC = klfast.QuantSpec.parse("int4-g32-sym+20")


def quantized(family="mamba2", tied=True):
    model = tiny(family, tied)
    specs = dict.fromkeys(matrices(model), SPEC.base) | {"lm_head": SPEC}
    return klfast.quantize_model(model, klfast.Plan(specs, "uniform"))


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(tied, tmp_path):
    model = quantized(tied=tied)
    folder = tmp_path / "model"
    klfast.save_quantized(model, folder)
    for loaded in (klfast.load_quantized(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert loaded.lm_head.spec == SPEC
        torch.testing.assert_close(loaded(batch()).logits, model(batch()).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded.lm_head.rows(torch.arange(61)), model.lm_head.rows(torch.arange(61)))
        assert torch.equal(loaded.get_input_embeddings()(batch()), model.get_input_embeddings()(batch()))


def test_transformers_own_folder_would_lose_the_correction(tmp_path):
    model = quantized("llama", tied=False)
    with pytest.raises(InvalidInputError, match=r"since lm_head has corrected rows; use klfast\.save_quantized"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_too_many_rows_are_refused_before_the_work_begins():
    model, plan = tiny("llama"), klfast.Plan({"lm_head": "int4-g32-sym+62"}, "uniform")
    for rounding in ({}, {"rounding": "gptq", "calibration": batch()}):
        with pytest.raises(InvalidInputError, match="lm_head: 62 rows cannot be corrected in a matrix of 61"):
            klfast.quantize_model(model, plan, progress=lambda *_: pytest.fail("it began"), **rounding)
    with pytest.raises(InvalidInputError, match="lm_head: 62 rows cannot be corrected in a matrix of 61; sweep"):
        klfast.sweep(model, batch(), ["int4-g32-sym", "int4-g32-sym+62"], progress=lambda *_: pytest.fail("it began"))


def test_rows_of_other_layers_are_swept_without():
    found = klfast.sweep(
        tiny("mamba2"), batch(2, 8), [SPEC.base, SPEC], "kl_teacher_student", rows=True, progress=False
    )
    assert {spec for *_, spec in found.rows} == {SPEC.base}


def test_a_damaged_number_of_rows(tmp_path):
    klfast.save_quantized(quantized(), tmp_path / "model")
    path = tmp_path / "model" / "klfast.json"
    content = json.loads(path.read_text())
    content["layers"]["lm_head"]["corrected"] = "twenty"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lm_head has 'twenty' corrected rows"):
        klfast.load_quantized(tmp_path / "model")
    content["layers"]["lm_head"]["corrected"] = 19
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="lm_head"):
        klfast.load_quantized(tmp_path / "model")


def test_plans_count_its_bytes_and_take_it_where_it_pays():
    model, ids = tiny("mamba2", tied=True), batch(8, 12)
    specs = [SPEC.base, SPEC, "int8-g32-sym"]
    swept = klfast.sweep(model, ids, specs, ("kl_teacher_student",), progress=False)
    assert {spec for name, spec in swept.measurements if name != "lm_head"} == {SPEC.base, klfast.QuantSpec(8, 32)}
    assert (
        swept.measurements["lm_head", SPEC].mean["kl_teacher_student"]
        < (swept.measurements["lm_head", SPEC.base].mean["kl_teacher_student"])
    )
    uniform = klfast.plan(swept, method="uniform", spec=SPEC.base)
    plan = klfast.plan(swept, uniform.predicted["bytes"] + SPEC.nbytes((61, 64)) - SPEC.base.nbytes((61, 64)))
    plan = klfast.Plan.from_json(plan.to_json())
    if plan.specs["lm_head"] != SPEC:
        plan = klfast.plan(swept, method="uniform", spec=SPEC.base, keep={"lm_head": SPEC})
    klfast.quantize_model(model, plan)
    assert sum(map(weight_bytes, matrices(model).values())) + other_bytes(model) == plan.predicted["bytes"]


def test_experts_are_refused():
    model = tiny("granite_hybrid_moe")
    name = next(name for name, one in matrices(model).items() if one.is_stack)
    with pytest.raises(InvalidInputError, match="experts, whose rows cannot be corrected"):
        klfast.quantize_model(model, klfast.Plan({name: SPEC}, "uniform"))


@torch.no_grad()
def test_evaluation_sees_the_corrected_rows():
    teacher, model = tiny("mamba2", tied=False), tiny("mamba2", tied=False)
    klfast.quantize_model(model, klfast.Plan({"lm_head": SPEC}, "uniform"))
    ids = batch(3, 12)
    p, q = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (teacher, model))
    truth = (p.exp() * (p - q)).sum(-1).mean().item()
    assert klfast.evaluate(model, ids, teacher=teacher, progress=False).kl == pytest.approx(truth, rel=1e-3)


BAD_ROWS = ([-1, 0], [5, 3], [3, 3], [323, 324], [-(2**31), 2])


@pytest.fixture(scope="module")
def corrected_folder(tmp_path_factory):
    """Save a model with two corrected rows in its head and two in a layer with 324 rows."""
    folder, spec = tmp_path_factory.mktemp("corrected") / "model", "int4-g32-sym+2:4"
    plan = klfast.Plan({"backbone.layers.0.mixer.in_proj": spec, "lm_head": spec}, "uniform")
    klfast.save_quantized(klfast.quantize_model(tiny("mamba2"), plan), folder)
    return folder


@pytest.mark.parametrize("rows", BAD_ROWS)
@pytest.mark.parametrize("layer", ["backbone.layers.0.mixer.in_proj", "lm_head"])
@pytest.mark.parametrize("load", [klfast.load_quantized, AutoModelForCausalLM.from_pretrained])
def test_rows_outside_the_layer_are_refused(load, layer, rows, corrected_folder, tmp_path):
    folder = shutil.copytree(corrected_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{layer}.weight_correction_rows"] = torch.tensor(rows, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sign(folder)
    with pytest.raises(CheckpointError, match=rf"the tensors of {layer} do not fit: correction_rows must rise") as told:
        load(folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("rows", BAD_ROWS)
@pytest.mark.parametrize("assign", [False, True])
def test_rows_outside_the_layer_in_a_state_dict(rows, assign):
    layer = klfast.QuantLinear(klfast.quantize(torch.randn(324, 32), "int4-g32-sym+2"))
    before = layer.quantized.dequantize()
    state = layer.state_dict() | {"weight_correction_rows": torch.tensor(rows, dtype=torch.int32)}
    with pytest.raises(
        RuntimeError, match="weight_correction_rows: correction_rows must rise strictly within 0 to 323"
    ):
        layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.quantized.dequantize(), before)


@pytest.mark.parametrize("rows", BAD_ROWS)
def test_rows_outside_the_layer_in_memory(rows):
    qt, bad = klfast.quantize(torch.randn(324, 32), "int4-g32-sym+2"), torch.tensor(rows, dtype=torch.int32)
    base, _, correction = qt.halves
    for make in (
        lambda: klfast.QuantizedTensor.corrected(base, bad, correction),
        lambda: klfast.QuantizedTensor([*base.parts, bad, *correction.parts], qt.shape, qt.spec),
    ):
        with pytest.raises(InvalidInputError, match="correction_rows must rise strictly within 0 to 323"):
            make()
    model = quantized(tied=False)
    rows_of_head = model.lm_head.weight_correction_rows
    rows_of_head[0] = 61
    with pytest.raises(InvalidInputError, match="correction_rows must rise strictly within 0 to 60"):
        klfast.generate(model, batch(1, 4), max_new_tokens=2)


def test_layers_to_be_filled_have_rows_of_their_own(tmp_path):
    layer = klfast.QuantLinear(klfast.quantize(torch.randn(45, 96), "int4-g32-sym+7"))
    for empty in (
        klfast.QuantLinear.empty((45, 96), layer.spec, device="cpu"),
        klfast.QuantLinear.empty((45, 96), layer.spec).to_empty(device="cpu"),
    ):
        empty.load_state_dict(layer.state_dict())
        assert torch.equal(empty.quantized.dequantize(), layer.quantized.dequantize())
