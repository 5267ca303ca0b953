"""Heads with corrected rows: in plans, models, files and transformers' own loader."""

import json

import pytest
import torch
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
    with pytest.raises(InvalidInputError, match=r"corrected rows.* use klfast\.save_quantized"):
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
