"""What layers cost under second-order rounding, estimated from a sweep, against measured divergences."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import batch, tiny

import klfast
from klfast.core.errors import InvalidInputError, ModelMismatchError, UnknownLayerError
from klfast.models.linears import row_parts
from klfast.models.matrices import matrices, matrix
from klfast.rounding import carries
from klfast.rounding import second_order_costs as estimates
from klfast.rounding.second_order import second_order
from klfast.rounding.second_order_costs import second_order_costs

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD = "lm_head"
SPECS = ("int4-channel-sym", "int4-g16-sym", "int6-g16-sym")


def costs(model, ids, specs=SPECS, swept=("int4-g32-sym",), **options):
    before = klfast.sweep(model, ids, swept, ("kl_teacher_student", "sqnr_db"), progress=False)
    return before, second_order_costs(model, before, ids, specs, progress=False, **options)


@torch.no_grad()
def kl(model, ids, name, values):
    student = copy.deepcopy(model)
    matrix(student, name).weight.copy_(values)
    log_p, log_q = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (model, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["mamba2", "llama"])
def test_predicts_the_divergence_of_layers_rounded_by_second_order(family):
    model, ids = tiny(family, tied=False), batch(48, 16)
    _, found = costs(model, ids)
    assert found.provenance["rounding"] == "gptq"
    assert {spec for _, spec in found.measurements} >= {klfast.QuantSpec.parse(text) for text in SPECS}
    name = next(name for name in matrices(model) if name.endswith(("out_proj", "o_proj")))
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    hessian, weight = seen[0].T @ seen[0] / len(seen[0]), model.get_submodule(name).weight.detach()
    for text in SPECS:
        spec = klfast.QuantSpec.parse(text)
        truth = kl(model, ids, name, second_order(weight, spec, hessian).dequantize(torch.float32))
        assert found.measurements[name, spec].mean["kl_teacher_student"] == pytest.approx(truth, rel=0.5)


def test_corrected_heads_cost_less_the_more_rows_they_have():
    model, ids = tiny("mamba2", tied=True), batch(48, 16)
    before, found = costs(model, ids, ("int4-g16-sym",), corrected=(0.1, 0.3, 1.0))
    kls = [
        found.measurements["lm_head", klfast.QuantSpec(4, 16, corrected=rows)].mean["kl_teacher_student"]
        for rows in (0, 6, 18, 61)
    ]
    assert kls == sorted(kls, reverse=True) and kls[-1] < 0.03 * kls[0]
    plan = klfast.plan(found, klfast.plan(found, method="uniform", spec="int4-g16-sym").predicted["bytes"] + 300)
    assert plan.specs["lm_head"].corrected
    assert any("second-order" in note for note in plan.notes)
    assert before.provenance.get("rounding") is None
    klfast.quantize_model(model, plan, rounding="gptq", calibration=ids, progress=False)
    assert model.lm_head.spec == plan.specs["lm_head"]


@torch.no_grad()
def test_rows_of_a_use_cost_what_correcting_them_saved():
    """Large errors cost less than in proportion: unless the sweep says so, other rows would seem to cost nothing."""
    model, ids = tiny("mamba2", tied=False), batch(48, 16)
    name = "backbone.layers.0.mixer.in_proj"
    first, end = row_parts(model, name)["dt"]
    weight = model.get_submodule(name).weight
    weight[first:end] *= 30
    before = klfast.sweep(model, ids, "int4-g32-sym", "kl_teacher_student", corrected="dt", progress=False)
    found = second_order_costs(model, before, ids, ("int4-g16-sym", "int8-g32-sym"), progress=False)
    plain, finer = klfast.QuantSpec(4, 16), klfast.QuantSpec(4, 16, corrected=end - first, first_corrected=first)
    assert {spec for layer, spec in found.measurements if layer == name} == {plain, finer, klfast.QuantSpec(8, 32)}
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(ids)
    hook.remove()
    hessian = seen[0].T @ seen[0] / len(seen[0])
    for spec in (plain, finer):
        truth = kl(model, ids, name, second_order(weight.clone(), spec, hessian).dequantize(torch.float32))
        assert found.measurements[name, spec].mean["kl_teacher_student"] == pytest.approx(truth, rel=0.5)


@pytest.mark.parametrize("family", ["mamba2", "llama"])
def test_int8_activations_in_groups_that_the_sweep_did_not_measure(family):
    model, ids = tiny(family, tied=False), batch(48, 16)
    swept = klfast.sweep(model, ids, ["int4-g32-sym"], activations=True, progress=False)
    found = second_order_costs(model, swept, ids, SPECS, progress=False)
    assert swept.activations.items() <= found.activations.items()
    truth = klfast.sweep(model, ids, SPECS, activations=True, progress=False)
    assert truth.activations.keys() <= found.activations.keys()
    estimated = truth.activations.keys() - swept.activations.keys()
    assert estimated
    for key in estimated:
        one, measured = found.activations[key].mean, truth.activations[key].mean
        assert one["kl_teacher_student"] == pytest.approx(measured["kl_teacher_student"], rel=0.2, abs=1e-9), key
        assert one["sqnr_db"] == pytest.approx(measured["sqnr_db"], abs=1), key
    plan = klfast.plan(found, mean_bits=8, activation="auto")
    assert plan.activations.keys() == plan.specs.keys()


def test_metrics_follow_the_error():
    model, ids = tiny("llama", tied=False), batch(48, 16)
    before, found = costs(model, ids, ("int8-g32-sym",))
    old, new = (
        before.measurements["lm_head", klfast.QuantSpec(4, 32)],
        found.measurements["lm_head", klfast.QuantSpec(8, 32)],
    )
    ratio = new.mean["kl_teacher_student"] / old.mean["kl_teacher_student"]
    assert new.mean["sqnr_db"] - old.mean["sqnr_db"] == pytest.approx(-10 * math.log10(ratio))
    assert new.stderr["kl_teacher_student"] == pytest.approx(ratio * old.stderr["kl_teacher_student"])
    assert klfast.Sensitivities.from_json(found.to_json()).measurements == found.measurements


def test_what_is_not_rounded_by_second_order_keeps_its_cost():
    model, ids = tiny("granite_hybrid_moe"), batch(48, 16)
    before, found = costs(model, ids, ("int4-g16-sym",))
    stacks = [name for name, one in matrices(model).items() if one.is_stack]
    assert stacks
    for (name, spec), measured in before.measurements.items():
        assert (found.measurements.get((name, spec)) == measured) == (name in stacks)
    few = second_order_costs(model, before, batch(1, 16), ("int4-g16-sym",), progress=False)
    assert few.measurements == before.measurements


def test_an_estimate_does_not_depend_on_how_many_rows_other_choices_correct():
    """Corrected rows are rounded otherwise than the same rows of a plain head."""
    model, ids = tiny("mamba2", tied=True), batch(48, 16)
    kls = []
    for corrected in ((), (0.1,), (0.1, 1.0)):
        found = costs(model, ids, ("int4-g16-sym",), corrected=corrected)[1].measurements
        of_head = {
            spec.corrected: one.mean["kl_teacher_student"] for (name, spec), one in found.items() if name == HEAD
        }
        kls.append(of_head)
    assert [sorted(each) for each in kls] == [[0], [0, 6], [0, 6, 61]]
    assert kls[1][0] == pytest.approx(kls[0][0], rel=1e-5)
    assert kls[2][0] == pytest.approx(kls[0][0], rel=1e-5)
    assert kls[1][6] == pytest.approx(kls[2][6], rel=0.02)


@pytest.mark.slow
def test_hidden_states_on_disk_and_activations_make_no_difference(monkeypatch):
    model, ids = tiny("zamba2", tied=False), batch(24, 16)
    before = klfast.sweep(model, ids, "int4-g32-sym", "kl_teacher_student", activations=True, progress=False)
    monkeypatch.setattr(estimates, "MOST_TOKENS", 6 * 16)
    truth = second_order_costs(model, before, ids, "int4-g32-sym", progress=False)
    monkeypatch.setattr(carries, "available_memory", lambda: 0)
    found = second_order_costs(model, before, ids, "int4-g32-sym", progress=False)
    assert found.measurements == truth.measurements != before.measurements
    assert found.activations == before.activations
    plan = klfast.plan(found, mean_bits=6, activation="auto")
    assert plan.specs and plan.activations.keys() == plan.specs.keys()


def test_bad_input():
    model, ids = tiny("llama"), batch(4, 16)
    swept = klfast.sweep(model, ids, "int4-g32-sym", progress=False)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(InvalidInputError, match="corrected must be shares of the head's rows"):
            second_order_costs(model, swept, ids, corrected=(0.5, wrong))
    with pytest.raises(InvalidInputError, match="costs of second-order rounding already"):
        second_order_costs(model, replace(swept, provenance={"rounding": "gptq"}), ids)
    with pytest.raises(UnknownLayerError, match="no linear layer"):
        second_order_costs(tiny("mamba2"), replace(swept, fingerprint=None), ids)
    with pytest.raises(ModelMismatchError):
        second_order_costs(tiny("llama", seed=5), swept, ids)
    with pytest.raises(InvalidInputError, match="not a quantization spec"):
        second_order_costs(model, swept, ids, "int5")
