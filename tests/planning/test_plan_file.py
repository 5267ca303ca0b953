"""Plans as JSON."""

import json
import math
from dataclasses import replace

import pytest

from klfast.core.errors import CheckpointError, InvalidInputError
from klfast.models.fingerprint import Fingerprint
from klfast.planning.plan_file import Plan
from klfast.quant.spec import QuantSpec

PLAN = Plan(
    {"a.b": QuantSpec(4, 64), "head": QuantSpec(8, -1, symmetric=False)},
    "optimal",
    Fingerprint("abc", (1.5, 2.25)),
    {"bytes": 1234, "kl": 0.0625},
    ("a note",),
    "mse",
    {"a.b": "int8", "head": "exact"},
)


@pytest.mark.parametrize("plan", [PLAN, Plan({}, "uniform")])
def test_round_trip(plan, tmp_path):
    text = plan.to_json(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == text
    read = Plan.from_json(tmp_path / "plan.json")
    assert read == plan
    assert list(map(type, read.predicted.values())) == list(map(type, plan.predicted.values()))


def unsigned(plan):
    """Return the plan's entries as klfast 0.1.0 wrote them."""
    later = ("scale", "sha256", "activations")
    return {name: value for name, value in json.loads(plan.to_json()).items() if name not in later}


def test_plans_without_digest_and_scale_can_be_read():
    assert Plan.from_json(json.dumps(unsigned(PLAN))) == replace(PLAN, scale=None, activations={})


def test_error_of_an_edited_plan_says_how_to_read_it():
    edited = json.loads(PLAN.to_json())
    edited["specs"]["head"] = "int4-g64-sym"
    with pytest.raises(
        CheckpointError,
        match=r"damaged \(its content does not match its sha256.*if you edited it remove scale and sha256",
    ):
        Plan.from_json(json.dumps(edited))
    del edited["sha256"]
    with pytest.raises(CheckpointError, match="it lacks 'sha256'"):
        Plan.from_json(json.dumps(edited))
    del edited["scale"]
    assert Plan.from_json(json.dumps(edited)).specs["head"] == QuantSpec(4, 64)


def test_no_flipped_bit_passes(tmp_path):
    """After a flip, the plan read is the same (white space changed), or the error names the file."""
    text = PLAN.to_json().encode()
    path = tmp_path / "plan.json"
    errors = []
    for position in range(len(text)):
        for bit in range(8):
            flipped = bytearray(text)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                assert Plan.from_json(path) == PLAN, flipped.decode()
            except CheckpointError as error:
                errors.append(str(error))
    assert all("plan.json" in error for error in errors)
    assert len(errors) > 0.8 * 8 * len(text)


def without(key):
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(schema="klfast-plan/9"), "not a klfast plan"),
        (without("schema"), "not a klfast plan"),
        (without("method"), "damaged"),
        (without("fingerprint"), "damaged"),
        (lambda data: data["specs"].update(head="int3"), "damaged.*int3"),
        (lambda data: data.update(specs=[1]), "damaged"),
        (lambda data: data["predicted"].update(kl="much"), "damaged.*kl is 'much'"),
        (lambda data: data["predicted"].update(kl=10**400), "damaged.*kl is 1000.*not a finite number"),
        (lambda data: data["predicted"].update(kl=math.nan), "damaged.*kl is nan"),
        (lambda data: data["fingerprint"].update(norms=[1.0, 10**400]), "damaged.*a norm is 1000"),
        (lambda data: data["fingerprint"].update(norms=[True]), "damaged.*a norm is True"),
        (lambda data: data["specs"].update(head=f"int4-g{10**400}"), "damaged.*not a quantization spec"),
        (lambda data: data["specs"].update(head="int4-g\u0661"), "damaged.*not a quantization spec"),
        (lambda data: data.update(scale="max", sha256=""), "damaged.*absmax or mse"),
        (lambda data: data.update(scale="mse"), "damaged.*lacks 'sha256'"),
        (lambda data: data.update(sha25="x"), "damaged.*unknown entry 'sha25'"),
        (lambda data: data.update(activations={"head": "int4"}), "damaged.*head: activation must be"),
        (lambda data: data.update(activations={"tail": "int8"}), "damaged.*an activation for tail, but no spec"),
        (lambda data: data.update(activations=["head"]), "damaged.*activations is"),
        (lambda data: data.update(schema="klfast-sensitivities/1"), "holds sensitivities; make a plan from them first"),
    ],
)
def test_damaged(damage, message, tmp_path):
    data = unsigned(PLAN)
    damage(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        Plan.from_json(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAN.to_json()[:-10], "truncated"),
        ("[" * 200_000, "nested too deeply"),
        ("[]", "not a klfast plan"),
        (None, "cannot read"),
    ],
    ids=["truncated", "deep", "list", "absent"],
)
def test_truncated_absent_or_foreign_files(content, message, tmp_path):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Plan.from_json(tmp_path / "plan.json")


def test_integers_too_long_for_python(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json().replace("1234", "1" * 5000))
    with pytest.raises(CheckpointError, match=r"plan\.json is truncated or not valid JSON"):
        Plan.from_json(path)


def test_plans_made_by_hand():
    made = Plan({"a": "int4-g64-sym", "b": QuantSpec(8)}, "uniform")
    assert made.specs == {"a": QuantSpec(4, 64), "b": QuantSpec(8, 64)}


@pytest.mark.parametrize(
    ("specs", "message"),
    [({"a": "int5"}, "not a quantization spec"), ({"a": 4}, "got int"), (["a"], "must be a mapping")],
)
def test_invalid_specs(specs, message):
    with pytest.raises(InvalidInputError, match=message):
        Plan(specs, "uniform")


def test_invalid_scale():
    with pytest.raises(InvalidInputError, match="absmax or mse, or None"):
        Plan({}, "uniform", scale="max")


@pytest.mark.parametrize("wrong", [{"predicted": {"kl": math.nan}}, {"notes": (PLAN,)}], ids=["nan", "note"])
def test_plans_that_json_cannot_hold(wrong):
    with pytest.raises(InvalidInputError, match="cannot be written as JSON"):
        Plan({}, "uniform", **wrong).to_json()
