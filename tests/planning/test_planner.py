"""klfast.plan: the three methods, budgets and plans on disk."""

import json
import math
import os
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_problems import (
    INT4,
    INT8,
    OTHER_BYTES,
    SHAPE,
    Perplexity,
    check_predictions,
    every_plan,
    layer_bytes,
    sensitivities,
)

import klfast
from klfast.core.errors import CheckpointError, InfeasibleBudgetError, InvalidInputError, KlfastError
from klfast.planning import milp, optimal, plan
from klfast.planning.plan_file import Plan
from klfast.quant.rounding import quantize
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import Measurement

# KL as in sweeps: from 1e-8 to 1e2, 4 bits usually but not always worse than 8
costs = st.floats(-8, 2).map(lambda exponent: 10.0**exponent)
rows = st.tuples(costs, costs).map(lambda pair: (min(pair), max(pair))) | st.tuples(costs, costs)
problems = st.builds(
    lambda rows, sizes: sensitivities(rows, [(64 * n, 64 * k) for (n, k), _ in zip(sizes, rows, strict=False)]),
    st.lists(rows, min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=6, max_size=6),
)


@settings(max_examples=50, deadline=None)
@given(problems, st.floats(0, 1))
def test_optimal_is_the_best_of_all_plans(found, position):
    plans = sorted(every_plan(found))
    # a budget that some plan meets exactly, since the limit is inclusive
    max_bytes, max_kl = plans[int(position * (len(plans) - 1))]
    made = plan(found, max_bytes=max_bytes)
    check_predictions(found, made)
    assert made.predicted["bytes"] <= max_bytes
    assert made.predicted["kl"] == pytest.approx(min(c for b, c in plans if b <= max_bytes), rel=1e-12, abs=0)
    made = plan(found, max_kl=max_kl)
    check_predictions(found, made)
    assert made.predicted["kl"] <= max_kl
    assert made.predicted["bytes"] == min(b for b, c in plans if c <= max_kl)
    if max_bytes > plans[0][0]:
        tighter = plan(found, max_bytes=max_bytes - 1)
        assert tighter.predicted["kl"] == pytest.approx(min(c for b, c in plans if b < max_bytes), rel=1e-12, abs=0)


@settings(max_examples=40, deadline=None)
@given(problems, st.sampled_from(["optimal", "greedy", "uniform"]), st.floats(4.0, 17.0))
def test_never_above_the_budget(found, method, mean_bits):
    try:
        made = plan(found, mean_bits=mean_bits, method=method)
    except InfeasibleBudgetError:
        smallest = 8 * sum(INT4.nbytes(info.shape) for info in found.layers.values())
        least = 8.5 if mean_bits >= 8 else smallest / sum(math.prod(info.shape) for info in found.layers.values())
        assert mean_bits < least
        return
    check_predictions(found, made)
    assert made.predicted["mean_bits"] <= mean_bits
    again = plan(found, mean_bits=made.predicted["mean_bits"], method=method)  # its own figure suffices
    assert again.predicted["mean_bits"] <= made.predicted["mean_bits"]


@settings(max_examples=20, deadline=None)
@given(problems, st.floats(0, 1), st.floats(0, 1))
def test_more_budget_is_never_worse(found, a, b):
    smallest = plan(found, max_kl=1e9).predicted["bytes"]
    largest = OTHER_BYTES + sum(info.float_bytes for info in found.layers.values())
    low, high = (smallest + int(x * (largest - smallest)) for x in sorted((a, b)))
    low, high = plan(found, max_bytes=low), plan(found, max_bytes=high)
    assert high.predicted["kl"] <= low.predicted["kl"] * (1 + 1e-12)
    assert plan(found, max_kl=low.predicted["kl"]).predicted["bytes"] <= low.predicted["bytes"]
    for method in ("greedy", "uniform"):
        try:
            other = plan(found, max_bytes=low.predicted["bytes"], method=method)
        except InfeasibleBudgetError:
            continue
        assert low.predicted["kl"] <= other.predicted["kl"] * (1 + 1e-12)


def test_solver_is_exact_where_greedy_is_not():
    # Taking the densest item first wastes room: the two others fit exactly.
    options = [[(60.0, 0), (0.0, 10)], [(100.0, 0), (0.0, 20)], [(120.0, 0), (0.0, 30)]]
    solution = optimal.solve(options, 50)
    assert solution.picks == [0, 1, 1] and solution.gap == 0


def test_the_limit_is_exact_where_running_sums_are_not():
    """0.1 added ten times in turn is the number before 1; exactly, it is more than 1."""
    options, whole = [[(1.0, 0.0), (0.0, 0.1)]] * 10, math.fsum([0.1] * 10)
    assert whole == 1.0
    assert optimal.solve(options, whole).picks == [1] * 10
    assert sum(optimal.solve(options, math.nextafter(whole, 0)).picks) == 9


def test_many_layers_of_equal_size_are_solved_exactly():
    """200 layers, as in a 1.4B model; the optimum is known by construction: the worst layers get 8 bits."""
    kl = [(1e-6 * (n + 1), 1e-4 * (n + 1)) for n in range(200)]
    found = sensitivities(kl, [(64, 64)] * 200)
    small, large = INT4.nbytes((64, 64)) + SHAPE, INT8.nbytes((64, 64)) + SHAPE
    made = plan(found, max_bytes=OTHER_BYTES + 150 * small + 50 * large)
    assert {name for name, spec in made.specs.items() if spec == INT8} == {f"layers.{n}.proj" for n in range(150, 200)}


def test_ties_go_to_fewer_bytes_and_are_repeatable():
    found = sensitivities([(0.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
    made = plan(found, mean_bits=16)
    assert made.specs == {"layers.0.proj": INT4, "layers.1.proj": INT8}  # the third costs nothing in full precision
    assert made == plan(found, mean_bits=16)


def random_options(seed, share):
    """Return 60 layers of three choices (value, weight), with realistic costs and sizes, and a limit."""
    generator = torch.Generator().manual_seed(seed)
    cost = (10 ** torch.empty(60, 2, dtype=torch.float64).uniform_(-6, 0, generator=generator)).sort().values.tolist()
    size = torch.randint(1, 200, (60,), generator=generator).tolist()
    options = [[(0.0, 16 * n), (a, 8 * n), (b, 4 * n)] for (a, b), n in zip(cost, size, strict=True)]
    return options, int(share * sum(size))


@pytest.mark.parametrize(("seed", "share"), [(6, 5.0), (19, 5.5), (3, 7.0)])
def test_milp_agrees_and_is_silent(seed, share, monkeypatch, capfd):
    options, limit = random_options(seed, share)
    exact = optimal.solve(options, limit)
    monkeypatch.setattr(optimal, "_MAX_PARTIAL_PLANS", 10)
    by_milp = optimal.solve(options, limit)  # with the first two seeds, the HiGHS of scipy 1.17 prints
    assert exact.gap == by_milp.gap == 0
    assert sum(layer[i][1] for layer, i in zip(options, by_milp.picks, strict=True)) <= limit
    value, other = (math.fsum(layer[i][0] for layer, i in zip(options, s.picks, strict=True)) for s in (exact, by_milp))
    assert other == pytest.approx(value, rel=1e-7)
    assert capfd.readouterr() == ("", "")


def test_milp_leaves_the_output_of_other_threads_alone(monkeypatch, capfd):
    """Even if these write to the descriptor itself, as C code and child processes do."""
    monkeypatch.setattr(optimal, "_MAX_PARTIAL_PLANS", 10)
    lines, done = [], threading.Event()

    def write():
        while not done.is_set():
            lines.append(f"line {len(lines)}\n")
            os.write(1, lines[-1].encode())
            time.sleep(1e-3)

    thread = threading.Thread(target=write)
    thread.start()
    optimal.solve(*random_options(6, 5.0))
    done.set()
    thread.join()
    assert len(lines) > 5 and capfd.readouterr() == ("".join(lines), "")


def test_milp_that_fails_or_takes_too_long(monkeypatch, tmp_path):
    monkeypatch.setattr(optimal, "_MAX_PARTIAL_PLANS", 10)
    (tmp_path / "fails.py").write_text("raise SystemExit('out of memory')")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(milp.highs, "__file__", str(tmp_path / "fails.py"))
    with pytest.raises(KlfastError, match=r"HiGHS failed .* \(out of memory\); use method='greedy'"):
        optimal.solve(*random_options(6, 5.0))
    monkeypatch.setattr(milp.highs, "__file__", str(tmp_path / "hangs.py"))
    monkeypatch.setattr(milp, "_GRACE", 0.5)
    options, limit = random_options(6, 5.0)
    found = optimal.solve(options, limit, time_limit=1.0)
    assert found.gap > 0 and sum(layer[i][1] for layer, i in zip(options, found.picks, strict=True)) <= limit


def test_milp_excludes_solutions_over_the_limit_by_less_than_its_tolerance(monkeypatch):
    monkeypatch.setattr(optimal, "_MAX_PARTIAL_PLANS", 0)
    options = [[(9.0, 0.0), (5.0, 1.0), (1.0, 1.0 + 1e-12)], [(3.0, 0.0), (2.0, 0.001)]]
    assert optimal.solve(options, 1.0).picks == [1, 0]


def test_time_limit_keeps_the_budget_and_is_noted(monkeypatch):
    monkeypatch.setattr(optimal, "_MAX_PARTIAL_PLANS", 0)
    monkeypatch.setattr(optimal, "solve_milp", lambda *_: (None, False))
    kl = [(1e-3 * (n + 1), 0.1 / (n + 1)) for n in range(12)]
    made = plan(sensitivities(kl), mean_bits=6.1, time_limit=1.0)
    assert made.predicted["mean_bits"] <= 6.1
    assert "stopped after 1 s" in made.notes[-1]


def test_infeasible_budgets_name_the_smallest_reachable():
    found = sensitivities([(0.1, 1.0), (0.2, 2.0)])
    smallest = OTHER_BYTES + sum(INT4.nbytes(info.shape) + SHAPE for info in found.layers.values())
    assert plan(found, max_bytes=smallest).specs == dict.fromkeys(found.layers, INT4)
    for method in ("optimal", "greedy", "uniform"):
        kind = "plan" if method == "optimal" else f"{method} plan"
        said = f"no {kind} meets {smallest - 1:,} bytes: the smallest reachable is {smallest:,} bytes; raise"
        with pytest.raises(InfeasibleBudgetError, match=said):
            plan(found, max_bytes=smallest - 1, method=method)
        with pytest.raises(InfeasibleBudgetError, match=r"smallest reachable is 4\.5000"):
            plan(found, mean_bits=4.49, method=method)
    with pytest.raises(InfeasibleBudgetError, match=r"smallest reachable is 0\.3;"):
        plan(found, max_kl=0.29, method="uniform")
    assert plan(found, max_kl=0.0).specs == {}


def test_plan_meets_its_own_mean_bits():
    """Even if 8 * bytes / weights * weights / 8 rounds to less than the bytes, as it does here."""
    found = sensitivities([(1.0, 2.0), (1.0, 9.0)], [(1, 64), (12, 64)])
    specs = dict(zip(found.layers, (INT4, INT8), strict=True))
    total = sum(layer_bytes(found, name, spec) for name, spec in specs.items())
    made = plan(found, mean_bits=8 * (total - 2 * SHAPE) / (13 * 64))
    assert made.specs == specs and made.predicted["bytes"] == total + OTHER_BYTES


def test_uniform():
    found = sensitivities([(0.1, 1.0), (0.2, 2.0)])
    assert plan(found, method="uniform", spec=INT4).specs == dict.fromkeys(found.layers, INT4)
    assert plan(found, max_kl=3.0, method="uniform").specs == dict.fromkeys(found.layers, INT4)
    assert plan(found, max_kl=2.9, method="uniform").specs == dict.fromkeys(found.layers, INT8)
    assert plan(found, mean_bits=9, method="uniform").specs == dict.fromkeys(found.layers, INT8)
    partly = plan(sensitivities([(0.1, 1.0), (None, None)]), method="uniform", spec=INT4)
    assert len(partly.specs) == 2 and partly.notes == (), "no layer keeps full precision"
    unmeasured = plan(found, method="uniform", spec=QuantSpec(4, 16, False))
    assert unmeasured.notes == ()
    assert "kl" not in unmeasured.predicted and unmeasured.predicted["mean_bits"] == 4 + 16 / 16 + 4 / 16


def test_predicted_bytes_are_those_of_quantized_tensors():
    spec = QuantSpec(4, 32, False)
    found = sensitivities([(0.1,), (0.2,)], [(63, 100), (7, 64)], [spec])
    made = plan(found, method="uniform", spec=spec)
    stored = {name: quantize(torch.randn(info.shape), made.specs[name]) for name, info in found.layers.items()}
    assert made.predicted["bytes"] == OTHER_BYTES + sum(tensor.nbytes + SHAPE for tensor in stored.values())


def test_storable_groups_are_planned_and_reported():
    g128 = QuantSpec(4, 128)
    found = sensitivities([(0.1,), (0.2,), (0.3,)], [(64, 1600), (64, 1600), (64, 256)], [g128])
    made = plan(found, mean_bits=5)
    assert list(made.specs.values()) == [QuantSpec(4, 100), QuantSpec(4, 100), g128]
    assert made.notes == (
        "int4-g128-sym became int4-g100-sym on 2 layers with 1600 inputs: a saved group size must divide the inputs",
    )
    weights = 2 * QuantSpec(4, 100).nbytes((64, 1600)) + g128.nbytes((64, 256))
    assert made.predicted["bytes"] == OTHER_BYTES + weights + 3 * SHAPE
    # of two specs stored as the same one, the one measured as stored counts
    for specs in ([g128, QuantSpec(4, 100)], [QuantSpec(4, 100), g128]):
        found = sensitivities([[0.3 if spec == g128 else 0.1 for spec in specs]], [(64, 1600)], specs)
        made = plan(found, mean_bits=5)
        assert made.predicted["kl"] == 0.1 and made.notes == ()
    # a prime number of inputs leaves only groups of 1, which are larger than fp16: the layer keeps full precision
    found = sensitivities([(0.1,), (0.2,)], [(64, 1601), (64, 256)], [g128])
    for made in (plan(found, max_kl=1.0), plan(found, method="uniform", spec=g128)):
        assert list(made.specs) == ["layers.1.proj"]
    assert "layers.0.proj keeping full precision" in made.notes[0]


def test_metrics():
    db = sensitivities([(40.0, 10.0), (30.0, 20.0), (math.inf, 0.0)], [(64, 64)] * 3, metric="sqnr_db")
    room = 2 * INT8.nbytes((64, 64)) + INT4.nbytes((64, 64)) + 3 * SHAPE
    made = plan(db, max_bytes=OTHER_BYTES + room, metric="sqnr_db")
    # noise power: 1e-4 and 0.1, 1e-3 and 0.01, 0 and 1
    assert [spec.bits for spec in made.specs.values()] == [8, 4, 8]
    assert "kl" not in made.predicted
    agree = sensitivities([(0.99, 0.5), (0.98, 0.9)], [(64, 64)] * 2, metric="top1_agree")
    made = plan(agree, max_bytes=OTHER_BYTES + room - INT8.nbytes((64, 64)) - SHAPE, metric="top1_agree")
    assert [spec.bits for spec in made.specs.values()] == [8, 4]
    reverse = sensitivities([(0.1, 0.2)], metric="kl_student_teacher")
    made = plan(reverse, max_kl=0.1)
    assert made.predicted["kl"] == 0.1 and "kl_teacher_student was not measured" in made.notes[0]


def test_dubious_measurements_are_noted():
    found = sensitivities([(-1e-9, 0.1), (math.nan, 0.2), (None, None)])
    found.measurements["layers.0.proj", INT4] = Measurement({"kl_teacher_student": 0.1}, {}, 100, below_noise=True)
    made = plan(found, max_kl=0.5)
    assert made.specs == {"layers.0.proj": INT4, "layers.1.proj": INT4}
    text = " | ".join(made.notes)
    assert "layers.2.proj keeping full precision" in text and "1 negative measurements" in text
    assert "1 measurements lie below the noise floor" in text and "layers.1.proj at int8-g32-sym left out" in text
    assert plan(found, max_kl=0.0).predicted["kl"] == 0.0
    # negative noise does not offset the cost of other layers
    assert list(plan(sensitivities([(-0.5, -0.5), (0.4, 0.5)]), max_kl=0.1).specs) == ["layers.0.proj"]


def test_predicted_perplexity():
    found = sensitivities([(0.1, 0.3), (0.2, 0.4)], provenance={"ce_teacher": 2.0})
    assert "perplexity" not in plan(found, mean_bits=4.5).predicted
    for i, measurement in enumerate(found.measurements.values()):
        measurement.mean["delta_ce"] = (0.01, 0.2, 0.02, -0.05)[i]
    for arguments in ({"mean_bits": 4.5}, {"method": "uniform", "spec": INT4}):
        assert plan(found, **arguments).predicted["perplexity"] == pytest.approx(math.exp(2.0 + 0.2 - 0.05), rel=1e-12)
    assert plan(found, max_kl=0.0).predicted["perplexity"] == math.exp(2.0)
    assert "perplexity" not in plan(found, method="uniform", spec=QuantSpec(4, 16)).predicted  # not measured
    for unknown in ({}, {"ce_teacher": math.nan}, {"ce_teacher": "2"}):
        found.provenance = unknown
        assert "perplexity" not in plan(found, mean_bits=4.5).predicted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give a budget: max_bytes"),
        ({"max_bytes": 10**6, "max_kl": 1}, "one budget, not max_bytes and max_kl"),
        ({"max_bytes": 10**6, "method": "best"}, "unknown method 'best'"),
        ({"max_bytes": 10**6, "metric": "kl"}, "unknown metric 'kl'"),
        ({"max_bytes": 10**6, "metric": "jsd"}, "jsd was not measured for layers.0.proj at int8-g32-sym"),
        ({"max_kl": -1.0}, "max_kl must be a finite number"),
        ({"mean_bits": math.nan}, "mean_bits must be a finite number"),
        ({"max_bytes": "1 GB"}, "max_bytes must be a finite number"),
        ({"max_bytes": 10**6, "spec": INT4}, "spec belongs to method='uniform'"),
        ({"max_bytes": 10**6, "evaluate": len}, "evaluate belongs to method='greedy'"),
        ({"method": "uniform"}, "needs spec="),
        ({"method": "uniform", "spec": QuantSpec(4, 16), "max_kl": 1.0}, "int4-g16-sym was not measured"),
        (
            {"method": "uniform", "spec": "int4-g32-sym+64:68"},
            r"layers.0.proj cannot be .* 4 rows from 64 on cannot be",
        ),
        ({"method": "greedy"}, "give a budget"),
        ({"method": "greedy", "evaluate": lambda _: 1.0, "max_kl": 1.0}, "not max_kl"),
        ({"method": "greedy", "evaluate": lambda _: 1.0, "gamma": 0.9}, "gamma must be"),
        ({"method": "greedy", "evaluate": lambda _: math.nan}, "evaluate gave nan"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InvalidInputError, match=message):
        plan(sensitivities([(0.1, 0.2)]), **arguments)


def test_wrong_sensitivities():
    with pytest.raises(InvalidInputError, match="hold no measurements"):
        plan(sensitivities([(None, None)]), mean_bits=8)
    with pytest.raises(InvalidInputError, match="plan takes Sensitivities"):
        plan({"layers": 1}, mean_bits=8)
    with pytest.raises(InvalidInputError, match="max_kl limits a KL"):
        plan(sensitivities([(0.1, 0.2)], metric="mse"), max_kl=1.0, metric="mse")


def test_greedy_keeps_its_baseline():
    # each step is within 10 % of the previous one, but only the first two are within 10 % of full precision
    found = sensitivities([(0.04,), (0.041,), (0.042,), (0.043,)], specs=[INT8])
    evaluate = Perplexity(found)
    made = plan(found, method="greedy", evaluate=evaluate, gamma=1.10)
    assert list(made.specs) == ["layers.0.proj", "layers.1.proj"]
    assert evaluate.asked[0] == {} and len(evaluate.asked) == 5  # the whole list is tried
    assert "accepted 2 of 4" in made.notes[-1]


def test_greedy_moves_layers_from_8_to_4_bits_and_takes_candidates_back():
    found = sensitivities([(0.001, 0.01), (0.002, 5.0), (0.02, 0.03)])
    evaluate = Perplexity(found)
    made = plan(found, method="greedy", evaluate=evaluate, gamma=1.05)
    assert made.specs == {"layers.0.proj": INT4, "layers.1.proj": INT8, "layers.2.proj": INT4}
    assert {"layers.0.proj": INT8} in evaluate.asked
    assert all(spec in (INT4, INT8) for asked in evaluate.asked for spec in asked.values())
    check_predictions(found, made)
    # a candidate larger than the layer's current choice is not tried
    found = sensitivities([(0.02, 0.01)])
    evaluate = Perplexity(found)
    assert plan(found, method="greedy", evaluate=evaluate).specs == {"layers.0.proj": INT4}
    assert len(evaluate.asked) == 2


def test_evaluated_greedy_stops_at_its_budget_or_fails():
    found = sensitivities([(0.001, 0.01), (0.002, 5.0)])
    evaluate = Perplexity(found)
    made = plan(found, mean_bits=13, method="greedy", evaluate=evaluate)
    assert made.specs == {"layers.0.proj": INT8, "layers.1.proj": INT8} and len(evaluate.asked) == 3
    with pytest.raises(InfeasibleBudgetError, match="raise mean_bits or gamma"):
        plan(found, mean_bits=5, method="greedy", evaluate=evaluate)
    reject = plan(found, method="greedy", evaluate=lambda made: math.nan if made.specs else 10.0)
    assert reject.specs == {}


def test_greedy_without_evaluation():
    found = sensitivities([(0.001, 0.01), (0.002, 5.0)])
    assert plan(found, max_kl=0.0125, method="greedy").specs == {"layers.0.proj": INT4, "layers.1.proj": INT8}
    assert plan(found, mean_bits=13, method="greedy").specs == {"layers.0.proj": INT8, "layers.1.proj": INT8}


def test_plan_survives_json(tmp_path):
    made = plan(sensitivities([(0.1, 0.2), (0.3, 0.4)], [(64, 1600), (64, 64)]), mean_bits=6.5)
    path = tmp_path / "plan.json"
    text = made.to_json(path)
    assert Plan.from_json(path) == Plan.from_json(text) == made
    assert list(Plan.from_json(path).specs) == list(made.specs)
    bare = Plan({}, "uniform")
    assert Plan.from_json(bare.to_json()) == bare
    assert klfast.plan is plan


TEXT = plan(sensitivities([(0.1, 0.2)]), mean_bits=8.5).to_json()


@pytest.mark.parametrize("cut", range(0, len(TEXT) - 2, 7))
def test_truncated_plans(tmp_path, cut):
    path = tmp_path / "cut.json"
    path.write_text(TEXT[:cut])
    with pytest.raises(CheckpointError, match=r"cut\.json"):
        Plan.from_json(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": "klfast-plan/0"},
        {"specs": {"a": "int3"}},
        {"specs": {"a": 4}},
        {"specs": []},
        {"predicted": {"bytes": "many"}},
        {"notes": "one"},
        {"fingerprint": {"structure": "x"}},
        {"fingerprint": {"structure": "x", "norms": [None]}},
        {"method": None},
    ],
)
def test_damaged_plans(damage):
    with pytest.raises(CheckpointError, match="the JSON text"):
        Plan.from_json(json.dumps({**json.loads(TEXT), **damage}))


@pytest.mark.parametrize("key", json.loads(TEXT))
def test_plans_that_lack_an_entry(key):
    data = json.loads(TEXT)
    del data[key]
    with pytest.raises(CheckpointError, match="the JSON text"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("name", ["binary", "absent"])
def test_unreadable_plans(tmp_path, name):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=f"{name}: "):
        Plan.from_json(tmp_path / name)
