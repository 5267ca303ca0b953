"""Folders of servable plans in vLLM's own parser: each layer has the scheme of the plan, also where vLLM fuses it."""

import json

import pytest
import torch
from servable_plans import servable_plan
from tiny_models import FAMILIES, VARIANTS, tiny
from vllm_parser import compressed_tensors_config, needs_vllm

import klfast
from klfast.checkpoint import expert_files
from klfast.models.linears import linear_names
from klfast.planning.servable import fused

pytestmark = needs_vllm
SERVED = [name for name in dict.fromkeys((*FAMILIES, *VARIANTS)) if "hymba" not in name]


@pytest.fixture(scope="module")
def parser():
    with compressed_tensors_config() as made:
        yield made


def scheme(parsed, name, members=()):
    """Return the bits, group and symmetry that vLLM finds for a layer, or for one made of members."""
    parsed.packed_modules_mapping = {name.rpartition(".")[2]: list(members)} if members else {}
    found = parsed.get_scheme_dict(torch.nn.Linear(1, 1), name)
    if found is None:
        return None
    assert found["format"] == "pack-quantized" and found["input_activations"] is None
    weights = found["weights"]
    return weights.num_bits, -1 if weights.strategy == "channel" else weights.group_size, weights.symmetric


def stored(spec):
    return None if spec is None else (spec.bits, spec.group_size, spec.symmetric)


@pytest.mark.parametrize("family", SERVED)
def test_schemes_are_the_plans(tmp_path, parser, family):
    model = tiny(family)
    plan = servable_plan(model)
    klfast.save_quantized(klfast.quantize_model(model, plan), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    parsed = parser.from_config(config)
    split = expert_files.projections(model)
    for stack, names in split.items():
        for name in names:
            assert scheme(parsed, f"{expert_files.experts_of(stack)}.1.{name}") == stored(plan.specs.get(stack))
    for group in fused([name for name in linear_names(model) if ".experts." not in name]):
        specs = {stored(plan.specs.get(name)) for name in group}
        assert specs == {scheme(parsed, name) for name in group}
        parent = group[0].rpartition(".")[0]
        together = scheme(parsed, f"{parent}.fused", [name.rpartition(".")[2] for name in group])
        assert {together} == specs, group
