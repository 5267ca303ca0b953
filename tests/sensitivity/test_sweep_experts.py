"""Sweeps of experts: against float64, whichever experts the tokens are routed to."""

import copy

import pytest
import torch
from sweep_models import KL, tokens
from tiny_models import CONFIGS, in_float64, tiny

import klfast
from klfast.models.matrices import matrices, matrix

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = klfast.QuantSpec(4, 32)
FAMILIES = ("granite_hybrid_moe", "qwen3_next", "lfm2_moe", "nemotron_h_moe")


def kl_in_float64(model, ids, name, rows=slice(None)):
    """Return the KL of a model with some rows of one matrix quantized."""
    teacher = in_float64(model)
    student = copy.deepcopy(teacher)
    weight = matrix(student, name).weight
    weight[rows] = klfast.quantize(weight[rows].float(), SPEC).dequantize(torch.float32).double()
    log_p, log_q = (network(ids).logits[:, :-1].log_softmax(-1) for network in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_kl_equals_float64(family):
    model, ids = tiny(family), tokens()
    stacks = [name for name, one in matrices(model).items() if one.is_stack]
    found = klfast.sweep(model, ids, SPEC, layers="experts.*")
    assert [name for name, _ in found.measurements] == stacks and len(stacks) >= 2
    for name in stacks:
        expected = kl_in_float64(model, ids, name)
        rounding = (expected * found.noise_floor[KL]) ** 0.5
        measured = found.measurements[name, SPEC]
        assert measured.mean[KL] == pytest.approx(expected, rel=1e-4, abs=2 * rounding) and not measured.below_noise


@torch.no_grad()
def test_experts_one_by_one_and_those_without_tokens(monkeypatch):
    """Seven tokens meet at most seven of the sixteen experts of a layer: the others change nothing."""
    config = CONFIGS["granite_hybrid_moe"]
    monkeypatch.setitem(CONFIGS, "granite_hybrid_moe", lambda: many(config()))
    model, ids = tiny("granite_hybrid_moe"), tokens(1, 7)
    met = set()
    experts = model.model.layers[0].block_sparse_moe.experts
    hook = experts.register_forward_pre_hook(lambda _, args: met.update(args[1].flatten().tolist()))
    in_float64(model)(ids)
    model(ids)
    hook.remove()
    name = "model.layers.0.block_sparse_moe.experts.down_proj"
    found = klfast.sweep(model, ids, SPEC, layers=name, rows=True)
    assert 1 < len(met) <= 7 and len(found.rows) == 16
    for i in range(16):
        measured, floor = found.rows[name, f"expert {i}", SPEC], found.noise_floor[KL]
        expected = kl_in_float64(model, ids, name, slice(64 * i, 64 * (i + 1)))
        assert (not measured.below_noise) == (expected > 0) == (i in met)
        room = 2 * (expected * floor) ** 0.5 + 10 * floor  # candidates run together, and so round otherwise
        assert measured.mean[KL] == pytest.approx(expected, rel=1e-3, abs=room)


def many(config):
    config.num_local_experts, config.num_experts_per_tok = 16, 1
    return config


@torch.no_grad()
def test_a_plan_of_experts_predicts_bytes_bits_and_kl():
    model, ids = tiny("lfm2_moe"), tokens()
    found = klfast.sweep(model, ids, ("int4-g32-sym", "int8-g32-sym"))
    plan = klfast.plan(found, mean_bits=6.5, keep={"*experts.down_proj": "int8-g32-sym"})
    kept = [name for name in matrices(model) if name.endswith("experts.down_proj")]
    assert kept and all(plan.specs[name].bits == 8 for name in kept)
    student = klfast.quantize_model(copy.deepcopy(model), plan)
    weights = sum(one.weight.numel() for one in matrices(model).values())
    bits = 8 * sum(one.nbytes for one in matrices(student).values()) / weights
    assert plan.predicted["mean_bits"] == pytest.approx(bits) and bits <= 6.5
    stored = sum(tensor.numel() * tensor.element_size() for tensor in student.state_dict().values())
    assert plan.predicted["bytes"] == stored
    measured = klfast.evaluate(student, ids, model).kl
    assert plan.predicted["kl"] == pytest.approx(measured, rel=0.5), "contributions are only nearly additive"
