"""The precision of each matrix of a model, and its digest."""

import pytest
from split_experts import mixed_plan
from tiny_models import tiny

import klfast
from klfast import Plan, QuantSpec
from klfast.models.expert_names import expert_name, stacked
from klfast.models.matrices import matrices
from klfast.models.precisions import by_stack, digest, precisions

INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)


@pytest.mark.parametrize("name", ["lfm2_moe", "granite_hybrid_moe"])
def test_of_a_plans_model_are_the_plans(name):
    model = tiny(name)
    mixed, swept = mixed_plan(model, others=INT8), [expert_name(stack, i) for stack in stacks(model) for i in range(4)]
    assert precisions(model) == {}
    klfast.quantize_model(model, mixed)
    assert precisions(model) == by_stack(mixed.specs, swept) == mixed.specs


def test_experts_with_one_spec_are_a_stack():
    model = tiny("lfm2_moe")
    names, each = stacks(model), [expert_name(stack, i) for stack in stacks(model) for i in range(4)]
    plan = Plan(dict.fromkeys(each, INT4), "uniform")
    klfast.quantize_model(model, plan)
    assert precisions(model) == by_stack(plan.specs, each) == dict.fromkeys(names, INT4)
    assert by_stack(plan.specs, names) == plan.specs, "without the experts' names nothing is known to be whole"
    assert by_stack({each[0]: INT4}, each) == {each[0]: INT4}


def test_digest():
    assert digest({"a": INT4, "b": INT8}) == digest({"b": INT8, "a": INT4})
    assert len({digest(one) for one in ({}, {"a": INT4}, {"a": INT8}, {"b": INT4})}) == 4


def stacks(model):
    return stacked(name for name, one in matrices(model).items() if one.is_stack)
