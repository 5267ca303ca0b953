"""Plans as JSON."""

import json

import pytest

from klfast.errors import CheckpointError
from klfast.types import Fingerprint, Plan, QuantSpec

PLAN = Plan(
    {"a.b": QuantSpec(4, 64), "head": QuantSpec(8, -1, symmetric=False)}, "optimal", Fingerprint("abc", (1.5, 2.25)),
    {"bytes": 1234.0, "kl": 0.0625}, ("a note",),
)


@pytest.mark.parametrize("plan", [PLAN, Plan({}, "uniform")])
def test_round_trip(plan, tmp_path):
    text = plan.to_json(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == text
    assert Plan.from_json(tmp_path / "plan.json") == plan


def without(key):
    return lambda data: data.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.update(schema="klfast-plan/9"), "no plan"),
        (without("schema"), "no plan"),
        (without("method"), "damaged"),
        (without("fingerprint"), "damaged"),
        (lambda data: data["specs"].update(head="int3"), "damaged.*int3"),
        (lambda data: data.update(specs=[1]), "damaged"),
        (lambda data: data["predicted"].update(kl="much"), "damaged"),
    ],
)
def test_damaged(damage, message, tmp_path):
    data = json.loads(PLAN.to_json())
    damage(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        Plan.from_json(tmp_path / "plan.json")


def test_truncated_absent_or_something_else(tmp_path):
    (tmp_path / "cut.json").write_text(PLAN.to_json()[:-10])
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for name, message in (("cut", "truncated"), ("deep", "nested too deeply"), ("list", "no plan"), ("none", "cannot read")):
        with pytest.raises(CheckpointError, match=message):
            Plan.from_json(tmp_path / f"{name}.json")
