"""Plans that count seconds: as a limit, as what is minimised, and as a prediction; files of timings."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from planning_problems import INT4, INT8, sensitivities

import klfast
from klfast.core.errors import CheckpointError, InfeasibleBudgetError, InvalidInputError, ModelMismatchError
from klfast.planning.timings import Product, Timings

COSTS = [(0.01, 0.4), (0.02, 0.3), (0.015, 0.5), (0.01, 0.1)]  # in INT8, in INT4
SECONDS = {None: 9e-4, INT8: 5e-4, INT4: 3e-4}
CONDITIONS = {"machine": "a CPU", "tier": "avx2", "threads": 2, "dtype": "float32"}


def found():
    return sensitivities(COSTS)


def timings(seconds=SECONDS):
    """Return times that grow with a layer's rows; for one shape INT8 is the fastest."""
    products = {}
    for info, (spec, each) in itertools.product(found().layers.values(), seconds.items()):
        odd = spec == INT8 and info.shape[0] == 128
        products[Product(info.shape, spec)] = 2e-4 if odd else each * info.shape[0] / 64
    return Timings(CONDITIONS, {"klfast": "1", "torch": "2"}, "x", products)


def every_plan():
    """Yield (seconds, KL) of every assignment."""
    names, timed = list(found().layers), timings()
    for specs in itertools.product((None, INT8, INT4), repeat=len(names)):
        pairs = list(zip(names, specs, strict=True))
        seconds = math.fsum(timed.of(Product(found().layers[name].shape, spec)) for name, spec in pairs)
        kl = math.fsum(found().measurements[pair].mean["kl_teacher_student"] for pair in pairs if pair[1])
        yield seconds, kl


@pytest.mark.parametrize("limit", [2.8e-3, 3.4e-3, 5e-3, 7e-3, 1.0])
def test_least_kl_within_seconds(limit):
    made = klfast.plan(found(), max_seconds=limit, timings=timings())
    assert made.predicted["kl"] == pytest.approx(min(kl for seconds, kl in every_plan() if seconds <= limit))
    assert made.predicted["seconds"] <= limit
    again = klfast.plan(found(), max_seconds=made.predicted["seconds"], timings=timings())
    assert again.specs == made.specs
    assert klfast.Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.5, 2.0])
def test_fewest_seconds_within_a_kl(limit):
    made = klfast.plan(found(), max_kl=limit, objective="latency", timings=timings())
    assert made.predicted["seconds"] == pytest.approx(min(seconds for seconds, kl in every_plan() if kl <= limit))
    assert made.predicted["kl"] <= limit


def test_other_methods_keep_the_limit():
    for method in ("greedy", "uniform"):
        made = klfast.plan(found(), max_seconds=4e-3, method=method, timings=timings())
        assert made.predicted["seconds"] <= 4e-3 and made.specs
    fastest = klfast.plan(found(), max_kl=9.0, method="uniform", objective="latency", timings=timings())
    assert set(fastest.specs.values()) == {INT4}
    refined = klfast.plan(found(), max_seconds=4e-3, timings=timings(), refine=lambda plan: plan.predicted["kl"])
    assert refined.predicted["kl_measured"] == refined.predicted["kl"] and refined.predicted["seconds"] <= 4e-3


@pytest.mark.parametrize("evaluate", [None, lambda plan: 1.0])
def test_greedy_counts_the_seconds_that_its_budget_limits(evaluate):
    """Here INT4 is smaller than INT8 but slower: a layer in it cannot return."""
    swept = sensitivities([(0.001, 0.002), (0.01, 0.02)], [(64, 64), (128, 64)])
    fastest = 3e-4 + 2e-4
    asked = {"method": "greedy", "timings": timings({None: 9e-4, INT8: 3e-4, INT4: 5e-4})}
    made = klfast.plan(swept, max_seconds=fastest * 1.1, evaluate=evaluate, **asked)
    assert made.predicted["seconds"] == pytest.approx(fastest) and set(made.specs.values()) == {INT8}
    kind = "greedy plan within gamma=1.1" if evaluate else "greedy plan"
    with pytest.raises(InfeasibleBudgetError, match=f"no {kind} meets 0.0004 seconds .* smallest reachable is 0.0005"):
        klfast.plan(swept, max_seconds=4e-4, evaluate=evaluate, **asked)
    if evaluate is None:
        made = klfast.plan(swept, max_kl=1.0, objective="latency", **asked)
        assert made.predicted["seconds"] == pytest.approx(fastest) and set(made.specs.values()) == {INT8}
        small = klfast.plan(swept, max_kl=1.0, **asked)
        assert set(small.specs.values()) == {INT4}, "unless bytes are asked for"


def test_any_plan_predicts_seconds():
    made = klfast.plan(found(), mean_bits=7, timings=timings())
    of_layers = [Product(info.shape, made.specs.get(name)) for name, info in found().layers.items()]
    assert made.predicted["seconds"] == pytest.approx(sum(map(timings().of, of_layers)))
    assert "seconds" not in klfast.plan(found(), mean_bits=7).predicted


def test_refusals():
    with pytest.raises(InfeasibleBudgetError, match=r"no plan meets 0.001 seconds a token: the smallest .* is 0.0026"):
        klfast.plan(found(), max_seconds=1e-3, timings=timings())
    with pytest.raises(InvalidInputError, match="max_seconds counts seconds, which needs timings"):
        klfast.plan(found(), max_seconds=1.0)
    with pytest.raises(InvalidInputError, match="'latency' goes with max_seconds, or with max_kl"):
        klfast.plan(found(), mean_bits=7, objective="latency", timings=timings())
    with pytest.raises(InvalidInputError, match="objective must be size or latency, got 'speed'"):
        klfast.plan(found(), max_kl=1.0, objective="speed", timings=timings())
    with pytest.raises(InvalidInputError, match="no 64 x 64 matrix in int4-g32-sym with exact"):
        klfast.plan(found(), max_seconds=1.0, timings=timings({None: 1.0, INT8: 1.0}))
    with pytest.raises(ModelMismatchError, match="timings are of a model with other layers"):
        klfast.plan(found(), max_seconds=1.0, timings=replace(timings(), structure="y"))


def test_files(tmp_path):
    path = tmp_path / "timings.json"
    timings().to_json(path)
    assert Timings.from_json(path) == timings()
    timings().require_conditions(CONDITIONS, str(path))
    for name, other in (("machine", "another CPU"), ("tier", "amx"), ("threads", 1), ("dtype", "bfloat16")):
        with pytest.raises(
            InvalidInputError, match=rf"{path} has timings with {name} .* here it is {other}; delete it"
        ):
            timings().require_conditions({**CONDITIONS, name: other}, str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema="klfast-plan/1"), "does not hold timings"),
        (lambda data: data.pop("tier"), "damaged .it lacks 'tier'"),
        (lambda data: data["products"][0].update(seconds=0), "a product takes 0.0 seconds"),
        (lambda data: data["products"][0].update(format="int3"), "damaged .'int3' is not a quantization spec"),
        (lambda data: data["products"][0].update(activation="int2"), "damaged .*activation"),
    ],
)
def test_damaged_files(change, message):
    data = json.loads(timings().to_json())
    del data["sha256"]
    change(data)
    with pytest.raises(CheckpointError, match=message):
        Timings.from_json(json.dumps(data))
