"""Models whose experts have different precisions, and the same models in float64."""

import torch
from tiny_models import in_float64

import klfast
from klfast import Plan, QuantSpec
from klfast.models.expert_names import expert_name
from klfast.models.matrices import matrices

MIXED = ("int4-g16-sym", None, "int8-g16-asym", "int4-g16-sym", "int6-g16-asym")  # None keeps full precision


def mixed_plan(model, specs=MIXED, others=None):
    """Return a plan with these specs for the experts of each stack in turn, and ``others`` for all other layers."""
    plan = {}
    for name, one in matrices(model).items():
        if one.is_stack:
            each = ((expert_name(name, i), specs[i % len(specs)]) for i in range(len(one.tensor)))
            plan |= {expert: spec for expert, spec in each if spec is not None}
        elif others is not None and "out_proj" not in name:
            plan[name] = others
    return Plan(plan, "uniform")


@torch.no_grad()
def float64_of(model, plan):
    """Return the model in float64 with the matrices that the plan names rounded, one by one."""
    truth = in_float64(model)
    held = matrices(truth)
    for name, spec in plan.specs.items():
        stack, _, expert = name.rpartition(".")
        weight = held[name].weight if name in held else held[stack].tensor[int(expert)]
        weight.copy_(klfast.quantize(weight.float(), QuantSpec.of(spec)).dequantize(torch.float32).double())
    return truth
