"""Sweeps that measure experts one by one, and the plans made from them: against float64, and from sweep to folder."""

import copy

import pytest
import torch
from split_experts import float64_of
from sweep_models import KL, snapshot, tokens
from test_sweep_experts import kl_in_float64, many
from tiny_models import CONFIGS, tiny

import klfast
from klfast import InvalidInputError, Plan
from klfast.core.errors import CheckpointError
from klfast.models.expert_names import expert_name, stack_in
from klfast.models.fingerprint import Fingerprint
from klfast.models.matrices import matrices, matrix, split_stacks
from klfast.models.sizes import total_bytes
from klfast.quant.spec import SHAPE_BYTES
from klfast.reporting.sweep_tables import by_kind, sweep_tables
from klfast.sensitivity.int8_inputs import rounded
from klfast.sensitivity.merge import read
from klfast.sensitivity.results import LayerInfo, Sensitivities

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC, FINER = klfast.QuantSpec(4, 32), klfast.QuantSpec(8, 32)
FAMILIES = ("granite_hybrid_moe", "qwen3_5_moe", "lfm2_moe", "nemotron_h_moe")


def stacks_of(model):
    return {name: one for name, one in matrices(model).items() if one.is_stack}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_kl_equals_float64(family):
    model, ids = tiny(family), tokens()
    before = snapshot(model)
    stack, one = list(stacks_of(model).items())[-1]
    found = klfast.sweep(model, ids, SPEC, experts=True, layers=stack)
    after = snapshot(model)
    assert before[1] == after[1] and all(
        a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    count, n, k = one.tensor.shape
    names = [expert_name(stack, i) for i in range(count)]
    assert [name for name, _ in found.measurements] == names
    for i, name in enumerate(names):
        assert found.layers[name].shape == (n, k) and found.layers[name].float_bytes == n * k * 4
        expected = kl_in_float64(model, ids, stack, slice(i * n, (i + 1) * n))
        rounding = (expected * found.noise_floor[KL]) ** 0.5
        assert found.measurements[name, SPEC].mean[KL] == pytest.approx(expected, rel=1e-3, abs=2 * rounding)


@torch.no_grad()
def test_it_measures_what_rows_measure():
    model, ids = tiny("lfm2_moe"), tokens()
    stack = next(iter(stacks_of(model)))
    each = klfast.sweep(model, ids, SPEC, experts=True, layers=stack)
    rows = klfast.sweep(model, ids, SPEC, layers=stack, rows=True)
    for i in range(4):
        expected = rows.rows[stack, f"expert {i}", SPEC].mean[KL]
        assert each.measurements[expert_name(stack, i), SPEC].mean[KL] == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert each.fingerprint == rows.fingerprint and each.other_bytes == rows.other_bytes
    whole = sum(info.float_bytes for info in rows.layers.values())
    assert sum(info.float_bytes for info in each.layers.values()) == whole


@torch.no_grad()
def test_int8_inputs_of_one_expert():
    """Its tokens' inputs are rounded, nobody else's."""
    model, ids = tiny("granite_hybrid_moe"), tokens()
    stack = "model.layers.1.block_sparse_moe.experts.down_proj"
    found = klfast.sweep(model, ids, SPEC, experts=True, layers=stack, activations=True)
    assert set(found.activations) == {(expert_name(stack, i), 32) for i in range(4)}
    experts = model.get_submodule(stack.rpartition(".")[0])
    for i in range(4):
        student = copy.deepcopy(model)
        student.get_submodule(stack.rpartition(".")[0]).forward = _by_hand(experts, i)
        log_p, log_q = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (model, student))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        measured = found.activations[expert_name(stack, i), 32].mean[KL]
        assert measured == pytest.approx(expected, rel=0.05, abs=20 * found.noise_floor[KL])
    assert len({round(m.mean[KL], 12) for m in found.activations.values()}) > 1


def _by_hand(experts, chosen):
    """Return the forward of a gated mixture in which the last matrix of one expert gets rounded inputs."""

    def forward(hidden, index, weights):
        y = torch.zeros_like(hidden)
        for t in range(len(hidden)):
            for i, weight in zip(index[t].tolist(), weights[t], strict=True):
                gate, up = (experts.gate_up_proj[i] @ hidden[t]).chunk(2)
                inner = experts.act_fn(gate) * up
                inner = rounded(inner[None], SPEC)[0] if i == chosen else inner
                y[t] += weight * (experts.down_proj[i] @ inner)
        return y

    return forward


@torch.no_grad()
def test_experts_without_tokens_get_the_fewest_bits(monkeypatch, tmp_path):
    """Seven tokens meet at most seven of sixteen experts: the plan spends its bytes on these."""
    config = CONFIGS["granite_hybrid_moe"]
    monkeypatch.setitem(CONFIGS, "granite_hybrid_moe", lambda: many(config()))
    model, ids, met = tiny("granite_hybrid_moe"), tokens(1, 7), {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: met.setdefault(name, set()).update(args[1].flatten().tolist())
            )
    model(ids)
    model = tiny("granite_hybrid_moe")
    found = klfast.sweep(model, ids, (SPEC, FINER), experts=True, layers="*.experts.*")
    coarse, fine = (klfast.plan(found, method="uniform", spec=s, layers="*.experts.*") for s in (SPEC, FINER))
    plan = klfast.plan(found, max_bytes=int((coarse.predicted["bytes"] + fine.predicted["bytes"]) / 2))
    finer = {name for name, spec in plan.specs.items() if spec == FINER}
    for name in plan.specs:
        stack, i = name.rpartition(".")[0], int(name.rpartition(".")[2])
        if i not in met[stack.rpartition(".")[0]]:
            assert name not in finer
    assert finer
    student = klfast.quantize_model(copy.deepcopy(model), plan)
    assert len(split_stacks(student)) == 4
    measured = klfast.evaluate(student, ids, model).kl
    assert plan.predicted["kl"] == pytest.approx(measured, rel=0.5), "contributions are only nearly additive"
    assert plan.predicted["kl"] < 0.5 * coarse.predicted["kl"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_from_a_sweep_to_a_folder(family, tmp_path):
    model, ids = tiny(family), tokens()
    found = klfast.sweep(model, ids, (SPEC, FINER), experts=True, activations=True)
    found.to_json(tmp_path / "sensitivities.json")
    found = Sensitivities.from_json(tmp_path / "sensitivities.json")
    plan = klfast.plan(found, mean_bits=7.0, activation="auto", keep={"*.experts.down_proj": "int8-g32-sym"})
    plan.to_json(tmp_path / "plan.json")
    plan = Plan.from_json(tmp_path / "plan.json")
    kept = [name for name in found.layers if stack_in(name).endswith(".experts.down_proj")]
    assert len(kept) >= 4 and all(plan.specs[name].bits == 8 for name in kept)
    student = klfast.quantize_model(copy.deepcopy(model), plan)
    weights = sum(one.weight.numel() for one in matrices(model).values())
    bits = 8 * sum(one.nbytes for one in matrices(student).values()) / weights
    assert plan.predicted["mean_bits"] == pytest.approx(bits) and bits <= 7.0
    shapes = sum(".experts." in name for name in found.layers) * SHAPE_BYTES  # fewer where a whole stack has one spec
    assert 0 <= plan.predicted["bytes"] - total_bytes(student) <= shapes
    klfast.save_quantized(student, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(klfast.generate(loaded, ids, 4), klfast.generate(student, ids, 4))
    exact = Plan(plan.specs, "uniform")
    expected = float64_of(model, exact)(ids).logits
    klfast.quantize_model(other := copy.deepcopy(model), exact, activation="exact")
    assert (other(ids).logits.double() - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert klfast.evaluate(student, ids, model).kl == pytest.approx(plan.predicted["kl"], rel=0.7)


@torch.no_grad()
def test_a_servable_plan_has_one_precision_for_all():
    model = tiny("lfm2_moe")
    found = klfast.sweep(model, tokens(), ("int4-channel-sym", "int8-channel-sym"), experts=True)
    plan = klfast.plan(found, mean_bits=18.0, servable=True)
    specs = {plan.specs.get(name) for name in found.layers if ".experts." in name}
    assert len(specs) == 1 and None not in specs
    klfast.quantize_model(model, plan)
    assert not split_stacks(model)


@torch.no_grad()
def test_a_sweep_continues_and_merges(tmp_path):
    model, ids = tiny("lfm2_moe"), tokens()
    stack = next(iter(stacks_of(model)))

    class StoppedError(Exception):
        pass

    def stop(done, total, what):
        if done > total / 2:
            raise StoppedError

    whole = klfast.sweep(model, ids, SPEC, experts=True, layers=[stack, "q_proj"])
    with pytest.raises(StoppedError):
        klfast.sweep(model, ids, SPEC, experts=True, layers=[stack, "q_proj"], resume=tmp_path / "r", progress=stop)
    again = klfast.sweep(model, ids, SPEC, experts=True, layers=[stack, "q_proj"], resume=tmp_path / "r")
    assert {key: m.mean for key, m in again.measurements.items()} == {
        key: m.mean for key, m in whole.measurements.items()
    }
    finer = klfast.sweep(model, ids, FINER, experts=True, layers=stack)
    whole.to_json(tmp_path / "a"), finer.to_json(tmp_path / "b")
    merged = read([tmp_path / "a", tmp_path / "b"])
    assert len(merged.measurements) == len(whole.measurements) + 4
    klfast.sweep(model, ids, FINER, layers="q_proj").to_json(tmp_path / "c")
    with pytest.raises(InvalidInputError, match=r"experts one by one, the other all of a layer together") as caught:
        read([tmp_path / "a", tmp_path / "c"])
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_second_order_costs_leave_experts_as_they_are():
    model, ids = tiny("lfm2_moe"), tokens(8, 33)
    found = klfast.sweep(model, ids, SPEC, experts=True, layers=["experts.down_proj", "layers.0.conv.in_proj"])
    costs = klfast.second_order_costs(model, found, ids, ("int4-g32-sym", "int4-g16-sym"), progress=False)
    for (name, spec), measured in found.measurements.items():
        if ".experts." in name:
            assert costs.measurements[name, spec] == measured
    assert ("model.layers.0.conv.in_proj", klfast.QuantSpec(4, 16)) in costs.measurements


@torch.no_grad()
def test_tables_group_experts_by_kind():
    found = klfast.sweep(tiny("lfm2_moe"), tokens(), SPEC, experts=True)
    kinds = [row[0] for row in by_kind(found, KL).rows]
    assert kinds.count("experts.down_proj") == 1 and not any(kind.isdigit() for kind in kinds)
    assert all(len(table.rows) <= 30 for table in sweep_tables(found))


def test_files_count_a_norm_for_each_stack(tmp_path):
    """Linear layers may bear such names, too: then each has a norm."""
    names = ["model.layers.0.mlp.experts.w1.0", "model.layers.0.mlp.experts.w1.1", "lm_head"]
    layers = {name: LayerInfo((64, 64), 8192) for name in names}
    for norms in (2, 3):
        Sensitivities(Fingerprint("x", (1.0,) * norms), layers, 100).to_json(tmp_path / "s.json")
        assert Sensitivities.from_json(tmp_path / "s.json").layers == layers
    for norms in (1, 4):
        Sensitivities(Fingerprint("x", (1.0,) * norms), layers, 100).to_json(tmp_path / "s.json")
        with pytest.raises(CheckpointError, match=f"it has {norms} norms for 2 layers"):
            Sensitivities.from_json(tmp_path / "s.json")


@torch.no_grad()
def test_an_adaptive_sweep():
    model = tiny("lfm2_moe")
    found = klfast.sweep(model, tokens(12), (SPEC, FINER), experts=True, budget="adaptive", layers="*.experts.*")
    assert len(found.measurements) == 2 * sum(".experts." in name for name in found.layers)
    derived = [m for m in found.measurements.values() if m.is_derived]
    assert derived
    stack = next(iter(stacks_of(model)))
    weight = matrix(model, expert_name(stack, 1)).weight
    errors = [
        float((klfast.quantize(weight, s).dequantize(torch.float32) - weight).square().sum()) for s in (SPEC, FINER)
    ]
    coarse, fine = (found.measurements[expert_name(stack, 1), spec] for spec in (SPEC, FINER))
    if fine.is_derived:
        assert fine.mean[KL] / coarse.mean[KL] == pytest.approx(errors[1] / errors[0], rel=1e-3)
