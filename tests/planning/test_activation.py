"""plan(activation="auto"): int8 where it costs less than a tenth of what rounding the weight does."""

import pytest
from planning_problems import INT4, INT8, sensitivities

import klfast
from klfast.core.errors import InvalidInputError
from klfast.planning.problem import Problem
from klfast.sensitivity.results import Measurement

KL = "kl_teacher_student"


def with_activations(costs):
    """Return sensitivities of layers with a KL of 1e-4 in INT8 and 1e-2 in INT4, and of this with int8 activations."""
    found = sensitivities([(1e-4, 1e-2)] * len(costs))
    for name, cost in zip(found.layers, costs, strict=True):
        found.activations[name, 32] = Measurement({KL: cost}, {KL: 0.0}, 100)
    return found


def test_a_layer_takes_int8_below_a_tenth_of_its_weights_cost():
    found = with_activations([9.99e-4, 1e-3, 2e-2, 0.0])
    plan = klfast.plan(found, method="uniform", spec=INT4, activation="auto")
    assert list(plan.activations.items()) == [
        ("layers.0.proj", "int8"),
        ("layers.1.proj", "exact"),
        ("layers.2.proj", "exact"),
        ("layers.3.proj", "int8"),
    ]
    assert plan.predicted["kl"] == pytest.approx(4e-2 + 9.99e-4, rel=1e-12)
    assert any(note.startswith("int8 activations in 2 of 4 quantized layers") for note in plan.notes)


def test_the_spec_of_the_weight_decides():
    found = with_activations([5e-4, 5e-4])
    fine = klfast.plan(found, method="uniform", spec=INT8, activation="auto")
    assert set(fine.activations.values()) == {"exact"} and fine.predicted["kl"] == pytest.approx(2e-4)
    mixed = klfast.plan(found, mean_bits=6.6, activation="auto")
    assert sorted(spec.bits for spec in mixed.specs.values()) == [4, 8]
    assert all((mixed.activations[name] == "int8") == (spec == INT4) for name, spec in mixed.specs.items())


@pytest.mark.parametrize("method", ["optimal", "greedy"])
def test_the_cost_of_activations_counts_in_a_budget(method):
    found = with_activations([5e-4])
    for activation, budget, spec in (("exact", 1.04e-2, INT4), ("auto", 1.04e-2, INT8), ("auto", 1.06e-2, INT4)):
        assert klfast.plan(found, max_kl=budget, method=method, activation=activation).specs == {"layers.0.proj": spec}


def test_layers_in_full_precision_have_no_activation():
    plan = klfast.plan(with_activations([1e-6, 1e-6]), mean_bits=13.0, activation="auto", exclude="layers.1.proj")
    assert plan.specs == {"layers.0.proj": INT4} and plan.activations == {"layers.0.proj": "int8"}


def test_exact_plans_record_nothing():
    assert klfast.plan(with_activations([0.0]), mean_bits=5.0).activations == {}


def test_noise_powers_and_disagreements_add_up():
    found = with_activations([5e-4])
    for key, sqnr, agreement in (("measurements", 20.0, 0.9), ("activations", 30.0, 0.95)):
        for one in getattr(found, key).values():
            one.mean.update(sqnr_db=sqnr, top1_agree=agreement)
    for metric, costs in (("sqnr_db", [1e-2, 1.1e-2]), ("top1_agree", [0.1, 0.15])):
        int8, int4 = Problem(found, metric, activation="auto").layers["layers.0.proj"][1:]
        assert [int8.cost, int4.cost] == pytest.approx(costs, rel=1e-9)


def test_says_what_was_not_measured():
    message = "needs kl_teacher_student of int8 activations, which was not measured for layers.0.proj in the groups of"
    with pytest.raises(InvalidInputError, match=f"{message} int8-g32-sym and 3 more; sweep with activations=True"):
        klfast.plan(sensitivities([(1e-4, 1e-2)] * 2), mean_bits=5.0, activation="auto")
    found = with_activations([0.0, 0.0])
    del found.activations["layers.1.proj", 32]
    assert klfast.plan(found, mean_bits=13.0, activation="auto", exclude="layers.1.proj").specs
    with pytest.raises(InvalidInputError, match=r"for layers.1.proj in the groups"):
        klfast.plan(found, mean_bits=5.0, activation="auto")
    for one in found.measurements.values():
        one.mean["jsd"] = 1e-3
    with pytest.raises(InvalidInputError, match="needs kl_teacher_student and jsd of int8 activations"):
        klfast.plan(found, mean_bits=5.0, activation="auto", metric="jsd")


def test_a_layer_whose_activations_break_keeps_exact_ones():
    found = with_activations([0.0, 0.0])
    del found.activations["layers.1.proj", 32]
    found.provenance["not_finite"] = ["layers.1.proj with int8 activations"]
    plan = klfast.plan(found, method="uniform", spec=INT4, activation="auto")
    assert plan.activations == {"layers.0.proj": "int8", "layers.1.proj": "exact"}
    assert any(note.startswith("layers.1.proj with int8 activations left out") for note in plan.notes)


def test_int8_everywhere_is_not_a_plans_choice():
    with pytest.raises(InvalidInputError, match='must be "exact" or "auto", got \'int8\'; quantize_model takes "int8"'):
        klfast.plan(with_activations([0.0]), mean_bits=5.0, activation="int8")


def test_a_spec_that_was_not_measured_keeps_exact_activations():
    plan = klfast.plan(with_activations([0.0]), method="uniform", spec="int4-g16-sym", activation="auto")
    assert plan.activations == {"layers.0.proj": "exact"}
