"""Plans of many sizes and uniform ones, under all that a plan can be asked for."""

import math

import pytest
from planning_problems import INT4, INT8, OTHER_BYTES, layer_bytes, sensitivities

from klfast.core.errors import InvalidInputError
from klfast.planning.front import front_plans, full_precision, uniform_plans
from klfast.quant.spec import QuantSpec

COSTS = [(0.01, 0.4), (0.02, 0.3), (0.015, 0.5), (0.01, 0.1)]
SHAPES = [(64, 64), (128, 64), (192, 64), (2048, 64)]  # the last is larger than all others together
NAMES = [f"layers.{n}.proj" for n in range(4)]
ROWS, HEAD_ROWS = QuantSpec(4, 32, corrected=4, first_corrected=320), QuantSpec(4, 32, corrected=8)
FUSED = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]


def found(specs=(INT8, INT4), costs=COSTS, **fields):
    return sensitivities(costs, SHAPES, specs, **fields)


def renamed(swept, names):
    known = dict(zip(swept.layers, names, strict=True))
    swept.layers = {known[name]: info for name, info in swept.layers.items()}
    swept.measurements = {(known[name], spec): one for (name, spec), one in swept.measurements.items()}
    return swept


CHOICES = [
    ({}, {}),
    ({"exclude": NAMES[3]}, {3: None}),
    ({"layers": "layers.[01].proj"}, {2: None, 3: None}),
    ({"keep": {NAMES[3]: INT4}}, {3: INT4}),
    ({"keep": {NAMES[3]: "full", NAMES[0]: INT8}}, {3: None, 0: INT8}),
]


@pytest.mark.parametrize(("choices", "fixed"), CHOICES)
def test_a_front_reaches_from_the_smallest_plan_to_the_largest_specs(choices, fixed):
    swept = found()
    plans = front_plans(swept, 9, **choices)
    for made, free in ((plans[0], INT4), (plans[-1], INT8)):
        specs = {name: fixed.get(n, free) for n, name in enumerate(NAMES)}
        assert made.specs == {name: spec for name, spec in specs.items() if spec}
        assert made.predicted["bytes"] == OTHER_BYTES + sum(layer_bytes(swept, *each) for each in specs.items())
    sizes, costs = ([made.predicted[name] for made in plans] for name in ("bytes", "kl"))
    assert sizes == sorted(set(sizes)) and costs == sorted(costs, reverse=True) and len(plans) > 2


def test_a_servable_front_reaches_as_far():
    """The head, excluded by the rules, is most of the model; q, k and v count as one."""
    swept = renamed(found(), [*FUSED[:3], "lm_head"])
    plans = front_plans(swept, 5, servable=True)
    assert [set(made.specs.values()) for made in plans] == [{INT4}, {INT8}]
    assert all(list(made.specs) == FUSED[:3] for made in plans)


def test_a_front_by_other_metrics():
    swept = found(costs=[(40.0, 10.0), (30.0, 20.0), (45.0, 12.0), (50.0, 25.0)], metric="sqnr_db")
    plans = front_plans(swept, 5, metric="sqnr_db")
    assert set(plans[0].specs.values()) == {INT4} and set(plans[-1].specs.values()) == {INT8} and len(plans) > 2
    assert set(uniform_plans(swept, metric="sqnr_db")) == {str(INT4), str(INT8)}
    full = full_precision(swept, metric="sqnr_db")
    assert full.predicted["bytes"] == OTHER_BYTES + sum(2 * math.prod(shape) for shape in SHAPES)
    with pytest.raises(InvalidInputError, match="kl_teacher_student was not measured"):
        front_plans(swept, 5)


def test_uniform_plans_are_of_specs_measured_on_every_free_layer():
    """Rows of one layer, and of a head, are no precision of others, whose matrices may lack such rows."""
    swept = found((INT8, INT4, ROWS, HEAD_ROWS), [(*row, None, None) for row in COSTS[:3]] + [(0.01, 0.1, 0.05, 0.04)])
    made = uniform_plans(swept)
    assert {spec: set(one.specs.values()) for spec, one in made.items()} == {str(INT4): {INT4}, str(INT8): {INT8}}
    alone = uniform_plans(swept, layers=NAMES[3])
    assert {spec: dict(one.specs) for spec, one in alone.items()} == {
        str(spec): {NAMES[3]: spec} for spec in (INT8, INT4, ROWS, HEAD_ROWS)
    }
    assert set(uniform_plans(swept, exclude=NAMES[3])) == {str(INT4), str(INT8)}
    broken = found(costs=[*COSTS[:3], (0.01, math.nan)])
    assert set(uniform_plans(broken)) == {str(INT8)}


def test_uniform_plans_keep_what_is_asked():
    made = uniform_plans(found(), keep={NAMES[3]: INT8})
    assert {spec: one.specs[NAMES[3]] for spec, one in made.items()} == {str(INT4): INT8, str(INT8): INT8}
    assert uniform_plans(found(), keep={"*": INT8}) == {}, "nothing is left to be uniform"
    swept = renamed(found(), FUSED)
    assert uniform_plans(swept, servable=True, keep={FUSED[0]: INT8, FUSED[3]: INT4}) == {}, "nor if the rest is fused"


def test_servable_uniform_plans_are_of_served_specs():
    swept = renamed(found((INT8, QuantSpec(6, 32), INT4), [(a, (a + b) / 2, b) for a, b in COSTS]), FUSED)
    assert set(uniform_plans(swept)) == {str(INT4), "int6-g32-sym", str(INT8)}
    assert set(uniform_plans(swept, servable=True)) == {str(INT4), str(INT8)}


def test_full_precision_says_nothing_of_what_others_choose():
    assert full_precision(found(), keep={NAMES[0]: INT8}).notes == ()
    assert full_precision(found(), keep={NAMES[0]: INT8}).specs == {}
