"""Measured fronts: each plan's figures are those of its own model, and what is measured is kept."""

import json
import math
from dataclasses import replace

import pytest
from planning_problems import sensitivities
from sweep_models import make, tokens

import klfast
from klfast import measured_front
from klfast.core import lock
from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.evaluation.front import Front, FrontPoint
from klfast.planning.front import front_plans
from klfast.planning.plan_file import Plan

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 4


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def swept(model):
    return klfast.sweep(model, tokens(4), ["int4-g32-sym", "int8-g32-sym"], progress=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(measured_front, "_NEW_TOKENS", 3)
    monkeypatch.setattr(measured_front, "_RUNS", 1)


def measured(model, swept, **changes):
    return klfast.measure_front(model, swept, tokens(3, seed=2), COUNT, **{"progress": False, **changes})


def test_each_point_is_what_its_plan_makes(model, swept, tmp_path):
    front = measured(model, swept)
    kinds = [point.kind for point in front.points]
    assert (kinds.count("planned"), kinds.count("uniform"), kinds.count("full")) == (COUNT, 2, 1)
    assert [point.nbytes for point in front.points] == sorted(point.nbytes for point in front.points)
    measure = klfast.measured_kl(model, tokens(3, seed=2))
    for point in front.points:
        assert point.tokens_per_second > 0
        if point.kind == "full":
            assert point.kl == pytest.approx(0, abs=1e-7) and point.nbytes == max(one.nbytes for one in front.points)
        else:
            assert point.kl == pytest.approx(measure(point.plan), rel=1e-6) and point.plan.predicted["kl"] > 0
    full = next(point for point in front.points if point.kind == "full")
    assert full.perplexity == pytest.approx(klfast.evaluate(model, tokens(3, seed=2)).perplexity, rel=1e-6)
    assert {point.label for point in front.points if point.kind != "planned"} == {
        "uniform int4-g32-sym",
        "uniform int8-g32-sym",
        "full precision",
    }
    front.to_json(tmp_path / "front.json")
    assert Front.from_json(tmp_path / "front.json") == front


def test_goes_on_where_it_was_stopped(model, swept, tmp_path, monkeypatch):
    path, quantized = tmp_path / "front.json", []

    def stop(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, swept, resume=path, progress=stop)
    assert len(Front.from_json(path).points) == 2
    with lock.held(path), pytest.raises(InvalidInputError, match=r"another process .* is working on"):
        measured(model, swept, resume=path)
    quantize = measured_front.quantize_model
    monkeypatch.setattr(measured_front, "quantize_model", lambda *a, **k: quantized.append(1) or quantize(*a, **k))
    front = measured(model, swept, resume=path)
    assert len(quantized) == COUNT + 2 - 2 and len(front.points) == COUNT + 3
    with pytest.raises(InvalidInputError, match="resume file of a front with other text_sha256"):
        klfast.measure_front(model, swept, tokens(2), COUNT, resume=path, progress=False)
    with klfast.using("scalar"), pytest.raises(InvalidInputError, match="a front with other tier"):
        measured(model, swept, resume=path)


def test_a_resumed_front_holds_figures_of_its_own_plans(model, swept, tmp_path, monkeypatch):
    """Scales change the model; measurements that leave the plans as they are change what is predicted of them."""
    path, quantized = tmp_path / "front.json", []
    measured(model, swept, resume=path)
    finer = replace(swept, provenance={**swept.provenance, "scale": "mse"})
    again = measured(model, finer, resume=path)
    measure = klfast.measured_kl(model, tokens(3, seed=2))
    for point in again.points:
        assert point.plan.scale == "mse" and point.kl == pytest.approx(measure(point.plan), rel=1e-6, abs=1e-7)
    monkeypatch.setattr(measured_front, "quantize_model", lambda *a, **k: quantized.append(a))
    doubled = {
        key: replace(one, mean={name: 2 * value for name, value in one.mean.items()})
        for key, one in finer.measurements.items()
    }
    third = measured(model, replace(finer, measurements=doubled), resume=path)
    assert not quantized and [point.kl for point in third.points] == [point.kl for point in again.points]
    for new, old in zip(third.points, again.points, strict=True):
        assert new.plan.predicted["kl"] == pytest.approx(2 * old.plan.predicted["kl"])


def test_fronts_of_sweeps_with_rows_of_one_layer_and_specs_that_no_other_engine_runs(model, swept):
    """Only what fits every layer is measured as a uniform plan; plans go by any metric."""
    found = dict(swept.measurements)
    largest = max(swept.layers, key=lambda name: swept.layers[name].shape[0])
    rows = swept.layers[largest].shape[0]
    for spec in ("int6-g32-sym", f"int4-g32-sym+{rows - 4}:{rows}", "int4-g32-sym+8"):
        found[largest, klfast.QuantSpec.parse(spec)] = found[largest, klfast.QuantSpec.parse("int8-g32-sym")]
    for choices in ({"metric": "sqnr_db"}, {"servable": True}):
        front = klfast.measure_front(model, replace(swept, measurements=found), tokens(2), 2, progress=False, **choices)
        uniform = {point.spec for point in front.points if point.kind == "uniform"}
        assert uniform == {"int4-g32-sym", "int8-g32-sym"}
        assert {point.kind for point in front.points} == {"planned", "uniform", "full"}


def test_plans_of_a_front_differ_and_grow():
    found = sensitivities([(0.01, 0.4), (0.02, 0.3), (0.015, 0.5), (0.01, 0.1)])
    plans = front_plans(found, 9)
    sizes, costs = ([plan.predicted[name] for plan in plans] for name in ("bytes", "kl"))
    assert sizes == sorted(set(sizes)) and costs == sorted(costs, reverse=True) and len(plans) > 4
    assert {spec.bits for spec in plans[0].specs.values()} == {4}
    assert {spec.bits for spec in plans[-1].specs.values()} == {8}
    kept = front_plans(found, 3, exclude="layers.0.proj")
    assert all("layers.0.proj" not in plan.specs for plan in kept)
    with pytest.raises(InvalidInputError, match="2 plans or more, not 1"):
        front_plans(found, 1)


def point(nbytes, kl):
    return FrontPoint(
        "planned", Plan({}, "optimal", None, {"bytes": nbytes, "mean_bits": 4.5}), None, kl, math.nan, 9.0, 1.0
    )


def test_the_best_are_those_that_none_beats_in_both():
    points = (point(10, 0.5), point(20, 0.6), point(20, 0.3), point(30, 0.3), point(40, 0.1))
    front = Front(points, {})
    assert [front.is_best(one) for one in points] == [True, False, True, False, True]
    read = Front.from_json(front.to_json())
    assert math.isnan(read.points[0].kl_stderr) and read.points[0].label == "planned, 4.50 bits a weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema="klfast-plan/1"), "is not a front"),
        (lambda data: data["points"][0].pop("kl"), "damaged .it lacks 'kl'"),
        (lambda data: data["points"][0].update(tokens_per_second="fast"), "tokens_per_second is 'fast'"),
        (lambda data: data["points"][0].update(plan={}), "damaged .*not a klfast plan"),
    ],
)
def test_damaged_files(change, message):
    data = json.loads(Front((point(10, 0.5),), {}).to_json())
    del data["sha256"]
    change(data)
    with pytest.raises(CheckpointError, match=message):
        Front.from_json(json.dumps(data))
