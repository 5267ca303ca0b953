"""klfast.plan with layers, exclude and keep, against every plan that they allow."""

import itertools
import math
import random

import pytest
from planning_problems import INT4, INT8, OTHER_BYTES, SHAPE, Perplexity, check_predictions, layer_bytes, sensitivities

from klfast.core.errors import InfeasibleBudgetError, InvalidInputError, UnknownLayerError
from klfast.planning import plan
from klfast.quant.spec import QuantSpec

NAMES = [f"layers.{n}.proj" for n in range(5)]


def problem(seed):
    draw = random.Random(seed)
    kl = [sorted(10 ** draw.uniform(-6, 0) for _ in range(2)) for _ in NAMES]
    return sensitivities(kl, [(64 * draw.randint(1, 40), 64 * draw.randint(1, 8)) for _ in NAMES])


CONSTRAINTS = [
    ({"exclude": "layers.4.proj"}, {4: [None]}),
    ({"layers": ["layers.[0-2].proj"]}, {3: [None], 4: [None]}),
    ({"layers": "re:.*[0-2]", "exclude": ["layers.1.*"]}, {1: [None], 3: [None], 4: [None]}),
    ({"keep": {"layers.4.proj": "int8-g32-sym"}}, {4: [INT8]}),
    (
        {"keep": {"layers.0.proj": INT4, "layers.[34].proj": "full", "layers.1.*": None}},
        {0: [INT4], 1: [None], 3: [None], 4: [None]},
    ),
    ({"exclude": "layers.0.proj", "keep": {"layers.0.proj": None, "layers.1.proj": INT8}}, {0: [None], 1: [INT8]}),
    ({"keep": {"*": INT8}}, {n: [INT8] for n in range(5)}),
]


def allowed(found, fixed):
    """Yield (specs, bytes, mean bits, KL) of every plan within the constraints."""
    weights = sum(math.prod(info.shape) for info in found.layers.values())
    for specs in itertools.product(*(fixed.get(n, [None, INT8, INT4]) for n in range(len(NAMES)))):
        chosen = dict(zip(NAMES, specs, strict=True))
        size = sum(layer_bytes(found, name, spec) for name, spec in chosen.items())
        kl = math.fsum(
            found.measurements[name, spec].mean["kl_teacher_student"] for name, spec in chosen.items() if spec
        )
        yield specs, size + OTHER_BYTES, 8 * (size - SHAPE * sum(map(bool, specs))) / weights, kl


def keeps_to(made, fixed):
    return all(made.specs.get(NAMES[n]) == spec for n, [spec] in fixed.items())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("arguments", "fixed"), CONSTRAINTS)
def test_every_method_keeps_to_the_patterns(arguments, fixed, seed):
    found = problem(seed)
    plans = list(allowed(found, fixed))
    for column, budget in ((1, "max_bytes"), (2, "mean_bits"), (3, "max_kl")):
        for limit in sorted({p[column] for p in plans})[:: max(1, len(plans) // 7)]:
            within = [p for p in plans if p[column] <= limit * (1 + 1e-13)]
            made = plan(found, **{budget: limit}, **arguments)
            check_predictions(found, made)
            assert keeps_to(made, fixed)
            if budget == "max_kl":
                assert made.predicted["bytes"] == min(p[1] for p in within)
            else:
                assert made.predicted["kl"] == pytest.approx(min(p[3] for p in within), rel=1e-12)
            for method in ("greedy", "uniform"):
                try:
                    made = plan(found, **{budget: limit}, method=method, **arguments)
                except InfeasibleBudgetError:
                    assert method == "uniform"  # which cannot reach every budget
                    continue
                check_predictions(found, made)
                assert keeps_to(made, fixed) and any(tuple(map(made.specs.get, NAMES)) == p[0] for p in within)


@pytest.mark.parametrize(("arguments", "fixed"), CONSTRAINTS)
def test_infeasible_budgets_name_the_smallest_reachable_under_patterns(arguments, fixed):
    found = problem(7)
    plans = list(allowed(found, fixed))
    least = min(p[1] for p in plans)
    for method in ("optimal", "greedy"):
        assert plan(found, max_bytes=least, method=method, **arguments).predicted["bytes"] == least
        with pytest.raises(InfeasibleBudgetError, match=f"smallest reachable is {least:,} bytes under these patterns"):
            plan(found, max_bytes=least - 1, method=method, **arguments)
    cost = min(p[3] for p in plans)
    if cost:
        for method in ("optimal", "greedy"):
            with pytest.raises(InfeasibleBudgetError, match=f"smallest reachable is {cost:.6g} under these patterns"):
                plan(found, max_kl=cost * 0.999, method=method, **arguments)


def test_uniform_quantizes_free_layers_and_keeps_the_rest():
    found = problem(1)
    made = plan(
        found, method="uniform", spec="int4-g32-sym", exclude="layers.0.proj", keep={"layers.1.proj": "int8-g32-sym"}
    )
    assert made.specs == {NAMES[1]: INT8, **dict.fromkeys(NAMES[2:], INT4)}
    check_predictions(found, made)
    only_measured_where_free = problem(1)
    del only_measured_where_free.measurements[NAMES[0], INT4]
    made = plan(only_measured_where_free, max_kl=100.0, method="uniform", exclude="layers.0.proj")
    assert made.specs == dict.fromkeys(NAMES[1:], INT4)
    assert plan(found, max_bytes=10**9, method="uniform", keep={"*": INT8}).specs == dict.fromkeys(NAMES, INT8)


def test_evaluated_greedy_starts_from_kept_layers():
    found = sensitivities([(0.001, 0.01), (0.002, 0.02), (0.003, 0.03)])
    evaluate = Perplexity(found)
    made = plan(found, method="greedy", evaluate=evaluate, keep={"layers.0.proj": INT8}, exclude="layers.2.proj")
    assert evaluate.asked[:2] == [{}, {"layers.0.proj": INT8}]
    assert all(asked["layers.0.proj"] == INT8 and "layers.2.proj" not in asked for asked in evaluate.asked[1:])
    assert made.specs == {"layers.0.proj": INT8, "layers.1.proj": INT4}
    assert "accepted 2 of 2 candidates" in made.notes[-1] and f"{10 * math.exp(0.021):.4f} planned" in made.notes[-1]
    found = sensitivities([(1.0, 2.0), (0.001, 0.002)])
    made = plan(found, method="greedy", evaluate=Perplexity(found), keep={"layers.0.proj": INT8})
    assert made.specs == {"layers.0.proj": INT8} and "above gamma" in made.notes[-2]


def test_kept_precision_is_the_stored_one():
    g128, g100 = QuantSpec(4, 128), QuantSpec(4, 100)
    found = sensitivities([(0.3, 0.1)], [(64, 1600)], [g128, g100])
    for asked in ("int4-g128-sym", "int4-g100-sym"):
        made = plan(found, max_kl=0.2, keep={"layers.0.proj": asked})
        assert made.specs == {"layers.0.proj": g100} and made.predicted["kl"] == 0.1
    # kept even if it saves nothing, which the planner would not choose by itself
    found = sensitivities([(0.1,), (0.2,)], [(64, 1601), (64, 256)], [g128])
    made = plan(found, max_kl=1.0, keep={"layers.0.proj": g128})
    assert made.specs == {"layers.0.proj": QuantSpec(4, 1), "layers.1.proj": g128}


def test_excluded_layers_need_no_measurement():
    found = sensitivities([(0.1, 0.2), (math.nan, math.inf), (None, None)])
    found.measurements[NAMES[1], INT8].mean.pop("kl_teacher_student")
    with pytest.raises(InvalidInputError, match=r"kl_teacher_student was not measured for layers\.1\.proj"):
        plan(found, mean_bits=16)
    made = plan(found, mean_bits=16, exclude=["layers.1.*", "layers.2.*"])
    assert made.notes == ("layers.1.proj and 1 more kept in full precision, as asked",)
    assert "layers.2.proj keeping full precision: not measured" in plan(found, mean_bits=16, exclude="layers.1.*").notes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": {"layers.0.proj": "int3"}}, InvalidInputError, "'int3' is not a quantization spec"),
        ({"keep": {"layers.0.proj": 4}}, InvalidInputError, "a QuantSpec or text such as int4-g64-sym, got int"),
        ({"keep": "layers.0.proj=int4"}, InvalidInputError, "keep must map patterns to specs"),
        (
            {"keep": {"layers.0.proj": INT8}, "exclude": "layers.0.*"},
            InvalidInputError,
            "which layers or exclude leave in full precision",
        ),
        (
            {"keep": {"layers.0.proj": INT8}, "layers": "layers.1.*"},
            InvalidInputError,
            "which layers or exclude leave in full precision",
        ),
        ({"keep": {"layers.9.proj": INT8}}, UnknownLayerError, "no linear layer matches 'layers.9.proj'"),
        ({"layers": "lm_head"}, UnknownLayerError, "no linear layer matches 'lm_head'"),
        ({"exclude": "nothing"}, UnknownLayerError, "no linear layer matches 'nothing'"),
        ({"layers": 5}, InvalidInputError, "must be text or a list of texts, got int"),
        ({"exclude": [5]}, InvalidInputError, "a pattern for layers must be a string, got int"),
        ({"keep": {5: INT8}}, InvalidInputError, "a pattern for layers must be a string, got int"),
        ({"exclude": "*"}, InvalidInputError, "leave no linear layer"),
        (
            {"keep": {"layers.0.proj": "int4-g16-sym"}},
            InvalidInputError,
            r"layers.0.proj was not measured at int4-g16-sym \(measured: int8-g32-sym, int4-g32-sym\)",
        ),
        (
            {"keep": {"layers.4.proj": "int8-g32-sym"}},
            InvalidInputError,
            r"layers.4.proj was not measured at int8-g32-sym \(measured: nothing\)",
        ),
        (
            {"keep": {"layers.3.proj": "int4-g32-sym"}},
            InvalidInputError,
            "kl_teacher_student of layers.3.proj at int4-g32-sym is not finite",
        ),
        (
            {"keep": {"*": INT8, "layers.0.proj": None}},
            InvalidInputError,
            r"two precisions of layers.0.proj, by '\*' and by 'layers.0.proj'",
        ),
    ],
)
def test_patterns_that_cannot_be_satisfied(arguments, error, message):
    found = sensitivities([(0.1, 0.2), (0.1, 0.2), (0.1, 0.2), (0.1, math.inf), (None, None)])
    with pytest.raises(error, match=message):
        plan(found, mean_bits=8, **arguments)
