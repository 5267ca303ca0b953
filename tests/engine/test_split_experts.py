"""Mixtures whose experts have different precisions on the native engine, against float64."""

import copy

import pytest
import torch
from split_experts import float64_of, mixed_plan
from test_engine import relative
from test_experts import changed
from tiny_models import batch, tiny

import klfast
from klfast.generation.engine import lower
from klfast.models.matrices import split_stacks

FAMILIES = ("granite_hybrid_moe", "qwen3_5_moe", "lfm2_moe", "nemotron_h_moe")


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("activation", "bound"), [("exact", 1e-4), ("int8", 3e-2)])
def test_equals_float64(family, activation, bound, monkeypatch):
    model = changed(family, monkeypatch, num_experts=7, num_local_experts=7)
    plan, ids = mixed_plan(model), batch(3, 12)
    truth = float64_of(model, plan)(ids, use_cache=False).logits
    klfast.quantize_model(model, plan, activation=activation)
    assert len(split_stacks(model)) >= 2
    engine = lower(model)
    for rows in (1, 3):
        state = engine.state(rows)
        assert relative(engine(ids[:rows, :11], state), truth[:rows, 10]) < bound
        assert relative(engine(ids[:rows, 11:], state), truth[:rows, 11]) < bound


@torch.inference_mode()
def test_equals_the_model_s_own_forward():
    model = tiny("lfm2_moe")
    klfast.quantize_model(model, mixed_plan(model, others="int8-g32-sym"))
    ids = batch(2, 9)
    engine = lower(model)
    assert relative(engine(ids, engine.state(2)), model(ids).logits[:, -1].double()) < 1e-4
    assert torch.equal(klfast.generate(model, ids, 8), model.generate(ids, max_new_tokens=8, do_sample=False))


@torch.inference_mode()
def test_bfloat16():
    model = tiny("granite_hybrid_moe", dtype=torch.bfloat16)
    plan, ids = mixed_plan(model), batch(2, 6)
    truth = float64_of(copy.deepcopy(model), plan)(ids).logits[:, -1]
    klfast.quantize_model(model, plan)
    engine = lower(model)
    assert relative(engine(ids, engine.state(2)), truth) <= 2 * relative(model(ids).logits[:, -1], truth) + 1e-2


@torch.inference_mode()
def test_explains_each_part():
    model = tiny("granite_hybrid_moe")
    klfast.quantize_model(model, mixed_plan(model))
    name = next(iter(split_stacks(model)))
    assert klfast.explain(model).layers[f"{name} x3"] == "a native instruction"
    engine = lower(model)
    assert engine.is_current()
    split_stacks(model)[name].dense = torch.nn.Parameter(split_stacks(model)[name].dense.detach().clone())
    assert not engine.is_current()
