"""plan(refine=...): whole plans are measured, and the best of them is kept."""

import math
import tracemalloc
from random import Random

import pytest
from planning_problems import INT4, INT8, sensitivities

import klfast
from klfast.core.errors import InvalidInputError
from klfast.planning.budget import Budget
from klfast.planning.problem import Problem
from klfast.planning.refine import _swaps

COSTS = [(0.01, 1.0), (0.01, 0.8), (0.01, 0.7), (0.01, 0.5)]  # in INT8, in INT4


def found():
    return sensitivities(COSTS, [(64, 64)] * 4)


def budget(n8):
    uniform = {spec: klfast.plan(found(), method="uniform", spec=spec).predicted["bytes"] for spec in (INT4, INT8)}
    return uniform[INT4] + n8 * (uniform[INT8] - uniform[INT4]) // 4


def truth(weights):
    """Return a measurement in which layers cost otherwise than the sweep says."""
    calls = []

    def measure(plan):
        calls.append(plan)
        return sum(
            w * (0.01 if plan.specs.get(name) == INT8 else 1.0) for name, w in zip(found().layers, weights, strict=True)
        )

    measure.calls = calls
    return measure


def test_swaps_find_what_the_sums_do_not_tell():
    measure = truth([0.1, 0.1, 0.1, 2.0])  # the last layer matters most, the sweep says least
    before = klfast.plan(found(), budget(1))
    assert [name for name, spec in before.specs.items() if spec == INT8] == ["layers.0.proj"]
    after = klfast.plan(found(), budget(1), refine=measure)
    assert [name for name, spec in after.specs.items() if spec == INT8] == ["layers.3.proj"]
    assert after.predicted["kl_measured"] == measure(after) < measure(before)
    assert all(plan.predicted["bytes"] <= budget(1) for plan in measure.calls)
    assert klfast.Plan.from_json(after.to_json()) == after
    assert any("refined" in note for note in after.notes)


def many(layers):
    """Return a problem, a budget, and a plan just within it of layers with costs of very different sizes."""
    random = Random(0)
    costs = [(cost / 100, cost) for cost in (10 ** random.uniform(-30, 3) for _ in range(layers))]
    problem = Problem(sensitivities(costs, [(64, 64 * random.randint(1, 3)) for _ in range(layers)]), None)
    picks = {name: random.choice(choices) for name, choices in problem.layers.items()}
    size = sum(choice.nbytes for choice in picks.values())
    return problem, Budget("max_bytes", size, size), picks


def test_swaps_come_by_their_predicted_cost():
    problem, limit, picks = many(200)
    found = list(_swaps(problem, limit, picks))
    costs = [math.fsum(choice.cost for choice in each.values()) for each in found]
    assert costs == sorted(costs) and len(found) > 100
    for each in found:
        assert list(each) == list(picks) and limit.met(each)
        assert sum(each[name].nbytes > picks[name].nbytes for name in picks) == 1


def test_swaps_of_many_layers_take_little_memory():
    """A plan of all layers for each swap would take more than a megabyte."""
    problem, limit, picks = many(300)
    tracemalloc.start()
    next(_swaps(problem, limit, picks))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


def test_never_worse_than_uniform():
    def measure(plan):
        return 0.1 if set(plan.specs.values()) == {INT4} and len(plan.specs) == 4 else 1.0

    made = klfast.plan(found(), budget(2), refine=measure, tries=0)
    assert set(made.specs.values()) == {INT4} and made.predicted["kl_measured"] == 0.1


def test_measures_each_plan_once_and_no_more_than_asked():
    measure = truth([1.0, 1.0, 1.0, 1.0])
    klfast.plan(found(), budget(2), refine=measure, tries=3)
    texts = [plan.to_json() for plan in measure.calls]
    assert len(set(texts)) == len(texts) <= 1 + 1 + 3


def test_plans_that_were_measured_are_no_tries():
    """After a swap is taken, those of the new plan include some that were measured."""
    swept = sensitivities([(0.01, cost) for cost in (0.9, 0.9, 0.1, 0.8, 0.8, 0.7, 0.7, 0.3)], [(64, 64)] * 8)
    sizes = [klfast.plan(swept, method="uniform", spec=spec).predicted["bytes"] for spec in (INT4, INT8)]
    weights, calls = dict(zip(swept.layers, (0.7, 1.8, 0.5, 2.3, 0.9, 2.6, 1.4, 2.0), strict=True)), []

    def measure(plan):
        calls.append(plan.to_json())
        return sum(w * (0.01 if plan.specs.get(name) == INT8 else 1.0) for name, w in weights.items())

    klfast.plan(swept, sizes[0] + 3 * (sizes[1] - sizes[0]) // 8, refine=measure, tries=7)
    assert len(calls) == len(set(calls)) == 1 + 1 + 7


def test_an_error_of_the_measurement_is_told_as_it_is():
    def measure(plan):
        raise InvalidInputError("lm_head: the weight holds a NaN")

    with pytest.raises(InvalidInputError, match="lm_head: the weight holds a NaN"):
        klfast.plan(found(), budget(2), refine=measure)
    with pytest.raises(InvalidInputError, match="refine must return the KL of a plan"):
        klfast.plan(found(), budget(2), refine=lambda plan: "much")


def test_a_measurement_that_fails_counts_as_the_worst():
    made = klfast.plan(found(), budget(2), refine=lambda plan: math.nan, tries=2)
    assert "kl_measured" not in made.predicted


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_kl": 1.0}, "refine"),
        ({"max_bytes": 1e9, "method": "uniform"}, "refine"),
        ({"max_bytes": 1e9, "refine": 3}, "refine"),
        ({"max_bytes": 1e9, "tries": -1}, "tries must be a number of swaps"),
        ({"max_bytes": 1e9, "tries": 2.5}, "tries must be a number of swaps"),
    ],
)
def test_what_cannot_be_refined(arguments, match):
    with pytest.raises(InvalidInputError, match=match):
        klfast.plan(found(), **{"refine": lambda plan: 1.0, **arguments})
