"""klfast.plan with numbers that no sweep or user should give: klfast's own error, or the right plan."""

import math

import numpy as np
import pytest
from planning_problems import INT4, INT8, OTHER_BYTES, every_plan, sensitivities

from klfast.core.errors import InfeasibleBudgetError, InvalidInputError
from klfast.planning import plan
from klfast.sensitivity.results import LayerInfo

HUGE = 10**400
BEYOND = pytest.param(HUGE, id="1e400")


@pytest.mark.parametrize("budget", ["max_bytes", "mean_bits", "max_kl"])
@pytest.mark.parametrize(
    "value",
    [
        -1,
        -0.5,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        BEYOND,
        pytest.param(10**5000, id="1e5000"),
        "8",
        [8],
        np.bool_(True),
    ],
)
@pytest.mark.parametrize("method", ["optimal", "greedy", "uniform"])
def test_invalid_budgets(budget, value, method):
    with pytest.raises(InvalidInputError, match=f"{budget} must be a finite number, at least 0, got"):
        plan(sensitivities([(0.1, 0.2)]), **{budget: value}, method=method)


@pytest.mark.parametrize("value", [1e308, pytest.param(2**1000, id="2**1000"), np.float32(1e30), np.int64(2**62)])
def test_budgets_larger_than_any_model(value):
    found = sensitivities([(0.1, 0.2), (0.3, 0.1)])
    assert plan(found, max_bytes=value).specs == plan(found, mean_bits=value).specs == {}
    assert plan(found, max_kl=value).specs == dict.fromkeys(found.layers, INT4)


@pytest.mark.parametrize("kl", [math.nan, math.inf, 1e308, -1e308])
@pytest.mark.parametrize(
    "arguments",
    [
        {"mean_bits": 6},
        {"max_kl": 1.0},
        {"max_bytes": 10**6, "method": "greedy"},
        {"method": "uniform", "spec": INT4, "max_kl": 1.0},
    ],
)
def test_sensitivities_without_a_usable_measurement(kl, arguments):
    message = r"kl_teacher_student is not finite in any measurement \(layers.0.proj at int8-g32-sym and 3 more"
    with pytest.raises(InvalidInputError, match=message):
        plan(sensitivities([(kl, kl), (kl, kl)]), **arguments)


def test_a_few_unusable_measurements_are_left_out_with_a_note():
    found = sensitivities([(0.1, 1e308), (1e308, 1e308)])
    made = plan(found, max_kl=1.0)
    assert made.specs == {"layers.0.proj": INT8}
    assert "layers.0.proj at int4-g32-sym and 2 more left out: kl_teacher_student is not finite" in made.notes
    with pytest.raises(InfeasibleBudgetError, match="3 measurements are left out: kl_teacher_student is not finite"):
        plan(found, mean_bits=6)


@pytest.mark.parametrize("delta", [1e308, math.inf, -math.inf, math.nan])
def test_no_perplexity_is_predicted_from_deltas_without_a_sum(delta):
    found = sensitivities([(0.1, 0.2), (0.1, 0.2)], provenance={"ce_teacher": 2.0})
    for n, measurement in enumerate(found.measurements.values()):
        measurement.mean["delta_ce"] = delta if n < 2 or math.isfinite(delta) else -delta
    assert "perplexity" not in plan(found, mean_bits=6).predicted
    found.provenance["ce_teacher"] = HUGE
    assert "perplexity" not in plan(found, mean_bits=6).predicted


def test_tiny_costs_neither_stop_nor_mislead_the_planner():
    """Differences of 1e-310 lead to rates beyond the range of floats; such small costs count as 0."""
    found = sensitivities([(0.0, 1e-310), (1e-320, 0.1), (1e-300, 5e-324)])
    made = plan(found, max_kl=0.0)
    assert made.specs == {"layers.0.proj": INT4, "layers.1.proj": INT8, "layers.2.proj": INT4}
    assert made.predicted["kl"] == 0
    found = sensitivities([(0.1, 9e99), (1e-8, 1.0)])
    for size, _ in every_plan(found):
        best = min(cost for other, cost in every_plan(found) if other <= size)
        assert plan(found, max_bytes=size).predicted["kl"] == best


@pytest.mark.parametrize("arguments", [{"mean_bits": 6}, {"max_bytes": 10**6}, {"max_kl": 1.0}])
@pytest.mark.parametrize("place", ["float_bytes", "shape", "other_bytes"])
@pytest.mark.parametrize("wrong", [math.inf, math.nan, -1, True, BEYOND, "8192", None, 0.5])
def test_invalid_sizes(wrong, place, arguments):
    found = sensitivities([(0.1, 0.2)])
    layer = LayerInfo((64, wrong if place == "shape" else 64), wrong if place == "float_bytes" else 8192)
    found.layers["layers.0.proj"], found.other_bytes = layer, wrong if place == "other_bytes" else 0
    with pytest.raises(InvalidInputError, match=r"the sensitivities are damaged: .* has .*; sweep again"):
        plan(found, **arguments)


def test_layers_without_weights():
    found = sensitivities([(0.1, 0.2)])
    found.layers["layers.0.proj"], found.other_bytes = LayerInfo((0, 64), 0), OTHER_BYTES
    with pytest.raises(InvalidInputError, match="have no weights"):
        plan(found, mean_bits=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean_bits": 8, "time_limit": -1.0}, "time_limit must be a finite number, at least 0, got -1.0"),
        ({"mean_bits": 8, "time_limit": math.nan}, "time_limit must be"),
        ({"mean_bits": 8, "time_limit": "60"}, "time_limit must be"),
        ({"method": "greedy", "evaluate": lambda _: 1.0, "gamma": "1.1"}, "gamma must be a finite number, at least 1"),
        ({"method": "greedy", "evaluate": lambda _: None}, "evaluate must return a perplexity, got NoneType"),
        ({"method": "greedy", "evaluate": lambda _: HUGE}, "evaluate must return a perplexity, got int"),
        ({"method": "greedy", "evaluate": 1.0}, "evaluate must be a function"),
        ({"method": "uniform", "spec": 4}, "a QuantSpec or text such as int4-g64-sym, got int"),
        ({"method": "uniform", "spec": "int5"}, "'int5' is not a quantization spec"),
    ],
)
def test_invalid_other_arguments(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        plan(sensitivities([(0.1, 0.2)]), **arguments)


def test_specs_may_be_text():
    found = sensitivities([(0.1, 0.2)])
    assert plan(found, method="uniform", spec="int4-g32-sym") == plan(found, method="uniform", spec=INT4)
    assert plan(found, mean_bits=8, time_limit=math.inf) == plan(found, mean_bits=8)
