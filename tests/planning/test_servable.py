"""plan(servable=True): what other engines load."""

import itertools
import math

import pytest
from planning_problems import INT4, INT8, sensitivities

import klfast
from klfast.core.errors import InfeasibleBudgetError, InvalidInputError
from klfast.planning.servable import fused, unserved
from klfast.sensitivity.results import Measurement

NAMES = (
    *(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    *(
        f"model.layers.1.linear_attn.{name}"
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    ),
    *(f"model.layers.2.mamba.{name}" for name in ("in_proj", "dt_proj", "out_proj")),
    "lm_head",
)
GROUPS = [[0, 1, 2], [3], [4, 5], [6], [7, 8], [9, 10], [11], [12], [13], [14], [15]]


def found(specs=(INT8, INT4)):
    kl = [[0.01 * (1 + n % 5) / 2**spec.bits for spec in specs] for n in range(len(NAMES))]
    swept = sensitivities(kl, [(32 * (1 + n % 3), 64) for n in range(len(NAMES))], specs)
    names = dict(zip(swept.layers, NAMES, strict=True))
    swept.layers = {names[name]: info for name, info in swept.layers.items()}
    swept.measurements = {(names[name], spec): one for (name, spec), one in swept.measurements.items()}
    return swept


def full(plan):
    return [name for name in NAMES if name not in plan.specs]


@pytest.mark.parametrize("method", ["optimal", "greedy", "uniform"])
def test_fused_layers_have_one_precision_and_some_have_full(method):
    swept = found()
    least, most = (
        klfast.plan(swept, 1e9, method="uniform", spec=spec, servable=True).predicted["bytes"] for spec in (INT4, INT8)
    )
    for share in (0.0, 0.2, 0.5, 0.8):
        plan = klfast.plan(swept, least + share * (most - least), method=method, servable=True)
        assert {NAMES[13], NAMES[14], "lm_head"} <= set(full(plan))
        for group in GROUPS:
            assert len({plan.specs.get(NAMES[n]) for n in group}) == 1
    assert klfast.plan(swept, mean_bits=6).specs.get("lm_head"), "only if asked"


def test_the_optimum_under_these_rules():
    swept = found()
    budget = klfast.plan(swept, mean_bits=7.0, servable=True).predicted["bytes"]
    free = [group for group in GROUPS if not {13, 14, 15} & set(group)]
    best = math.inf
    for choice in itertools.product((None, INT8, INT4), repeat=len(free)):
        size = swept.other_bytes + sum(swept.layers[NAMES[n]].float_bytes for n in (13, 14, 15))
        cost = 0.0
        for group, spec in zip(free, choice, strict=True):
            for n in group:
                info = swept.layers[NAMES[n]]
                size += info.float_bytes if spec is None else spec.saved_bytes(info.shape)
                cost += 0.0 if spec is None else swept.measurements[NAMES[n], spec].mean["kl_teacher_student"]
        if size <= budget:
            best = min(best, cost)
    assert klfast.plan(swept, budget, servable=True).predicted["kl"] == pytest.approx(best, rel=1e-9)


def test_specs_that_no_other_engine_runs_are_left_out():
    specs = (INT8, klfast.QuantSpec(6, 32), INT4)
    swept = found(specs)
    swept.measurements["lm_head", klfast.QuantSpec(4, 32, corrected=3)] = Measurement(
        {"kl_teacher_student": 0.0}, {}, 9
    )
    plan = klfast.plan(swept, mean_bits=8.0, servable=True)
    assert set(plan.specs.values()) <= {INT4, INT8}
    assert klfast.QuantSpec(6, 32) in klfast.plan(swept, mean_bits=6.5).specs.values()


def test_refined_plans_keep_the_rules():
    seen = []

    def measure(plan):
        seen.append(plan)
        return sum(0.1 if spec == INT4 else 0.01 for spec in plan.specs.values()) / len(seen)

    klfast.plan(found(), mean_bits=8.0, servable=True, refine=measure, tries=8)
    assert len(seen) > 3
    for plan in seen:
        assert all(len({plan.specs.get(NAMES[n]) for n in group}) == 1 for group in GROUPS)


@pytest.mark.parametrize("method", ["optimal", "greedy", "uniform"])
def test_a_kept_layer_decides_for_those_fused_with_it(method):
    swept = found()
    chosen = {"spec": INT4} if method == "uniform" else {}
    for wanted in (INT8, None):
        plan = klfast.plan(swept, mean_bits=12, method=method, servable=True, keep={"k_proj": wanted}, **chosen)
        assert {plan.specs.get(NAMES[n]) for n in (0, 1, 2)} == {wanted}
        assert plan.specs, "others are quantized"


UNSERVED = [klfast.QuantSpec(6, 32), klfast.QuantSpec(8, 32, symmetric=False), klfast.QuantSpec(4, 16)]


@pytest.mark.parametrize("spec", [*UNSERVED, klfast.QuantSpec(4, 32, corrected=3)], ids=str)
def test_specs_that_are_asked_for_but_no_other_engine_runs(spec):
    swept = found((INT8, spec, INT4))
    assert spec not in klfast.plan(swept, mean_bits=8.5, servable=True).specs.values()
    with pytest.raises(InvalidInputError, match="no other engine runs"):
        klfast.plan(swept, method="uniform", spec=spec, servable=True)
    with pytest.raises(InvalidInputError, match=f"keep asks for .* on {NAMES[3]}, which no other engine runs"):
        klfast.plan(swept, 1e9, servable=True, keep={"o_proj": spec})


def test_notes_tell_what_was_asked_from_what_serving_takes():
    attention, fixed = NAMES[0].removesuffix("q_proj"), f"{NAMES[13]} and 2 more keeping full precision"
    serving = f"{fixed}: not quantized in servable plans"
    assert klfast.plan(found(), 1e9, servable=True).notes == (serving,)
    for method, spec in (("optimal", None), ("uniform", INT4)):
        made = klfast.plan(found(), 1e9, method=method, spec=spec, servable=True, keep={"q_proj": "full"})
        assert made.notes == (
            f"{attention}q_proj kept in full precision, as asked",
            f"{attention}k_proj and 1 more kept in full precision, as asked of layers fused with them",
            serving,
        )
    made = klfast.plan(found(), 1e9, servable=True, keep={"q_proj": INT8}, exclude="lm_head")
    assert made.notes == (
        f"{attention}q_proj kept in int8-g32-sym, as asked",
        "lm_head kept in full precision, as asked",
        f"{attention}k_proj and 1 more kept in int8-g32-sym, as asked of layers fused with them",
        f"{NAMES[13]} and 1 more keeping full precision: not quantized in servable plans",
    )


def test_notes_on_fused_layers_without_a_precision_in_common():
    swept = found()
    del swept.measurements[NAMES[0], INT4], swept.measurements[NAMES[1], INT8]
    said = f"{NAMES[0]} and 2 more keeping full precision: no spec that other engines run was measured on all layers"
    [_, note] = klfast.plan(swept, 1e9, servable=True).notes
    assert note.startswith(said)
    assert len(klfast.plan(swept, method="uniform", spec=INT8, servable=True).notes) == 1, "that needs no measurement"
    swept = sensitivities([(0.1, 0.2)] * 3, [(1, 16), (64, 16), (64, 16)])  # in INT8 the first saves nothing
    names = dict(zip(swept.layers, NAMES[:3], strict=True))
    swept.layers = {names[name]: info for name, info in swept.layers.items()}
    swept.measurements = {(names[name], spec): one for (name, spec), one in swept.measurements.items()}
    assert klfast.plan(swept, method="uniform", spec=INT8, servable=True).notes == (
        f"1 layers keep full precision, since the spec saves nothing: {NAMES[0]}",
        f"2 layers keep full precision, since not all layers fused with them can have the spec: {NAMES[1]}, {NAMES[2]}",
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({}, r"bytes in a servable plan, which leaves .* and 2 more in full precision; raise .* do without servable$"),
        ({"exclude": "o_proj"}, r"in full precision under these patterns; .* leave the planner more layers$"),
        ({"exclude": ["dt_proj", "mamba.out_proj", "lm_head"]}, r"bytes in a servable plan under these patterns; "),
    ],
)
def test_budgets_that_no_servable_plan_meets(patterns, message):
    with pytest.raises(InfeasibleBudgetError, match=message):
        klfast.plan(found(), 1, servable=True, **patterns)
    with pytest.raises(InvalidInputError, match="no spec that other engines run was measured on every layer"):
        klfast.plan(found([klfast.QuantSpec(6, 32)]), 1e9, method="uniform", servable=True)


def test_contradictions_and_names():
    with pytest.raises(InvalidInputError, match="no precision in common"):
        klfast.plan(found(), 1e9, servable=True, keep={"q_proj": INT4, "k_proj": INT8})
    assert [[NAMES.index(name) for name in group] for group in fused(NAMES)] == GROUPS


def test_what_other_engines_do_not_load():
    swept = found()
    assert not unserved(NAMES, klfast.plan(swept, mean_bits=8, servable=True).specs)
    odd = klfast.QuantSpec(4, 16)
    specs = {"lm_head": INT4, NAMES[3]: odd, NAMES[4]: INT4, NAMES[5]: INT8, NAMES[6]: INT8, NAMES[13]: INT4}
    assert unserved(NAMES, specs) == [NAMES[3], NAMES[4], NAMES[5], NAMES[13], "lm_head"]


def test_all_experts_have_one_symmetric_precision_and_stacked_ones_have_full():
    names = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    stacked = "model.layers.0.block_sparse_moe.experts.down_proj"
    assert fused([*names, names[0].replace("mlp.experts", "mlp.shared_expert")])[0] == names
    asymmetric = klfast.QuantSpec(4, 32, symmetric=False)
    assert unserved([*names, stacked], dict.fromkeys([*names, stacked], INT4)) == [stacked]
    assert unserved(names, {name: INT8 if "0" in name else INT4 for name in names}) == names
    assert unserved(names, dict.fromkeys(names, asymmetric)) == names
    assert not unserved(["model.layers.0.mlp.up_proj"], {"model.layers.0.mlp.up_proj": asymmetric})
