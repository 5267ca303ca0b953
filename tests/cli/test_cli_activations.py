"""Int8 activations on the command line: sweep, plan, quantize, eval and report."""

import json

import pytest
import tiny_folder
from command_line import FEW, TEXT, fails, klf

import klfast
from klfast.checkpoint import by_name
from klfast.models.activations import int8_layers
from klfast.models.linears import linears
from klfast.quant.spec import storable_spec


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Create a folder with a model, a text, sensitivities with and without activations, and a plan with them."""
    folder = tmp_path_factory.mktemp("work")
    tiny_folder.save_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    sweep = ("sweep", folder / "model", "--calibration", folder / "text.txt", *FEW)
    klf(*sweep, "--activations", "--out", folder / "sens.json")
    klf(*sweep, "--out", folder / "plain.json")
    klf("plan", folder / "sens.json", "--mean-bits", 6, "--activation", "auto", "--out", folder / "plan.json")
    return folder


def test_the_plan_records_what_the_rule_says(work):
    made = klfast.Plan.from_json(work / "plan.json")
    found = klfast.Sensitivities.from_json(work / "sens.json")
    kl, ratios = "kl_teacher_student", {}
    for (name, spec), weight in found.measurements.items():
        stored = storable_spec(spec, found.layers[name].shape[1])
        ratios[name, stored] = found.int8_activations(name, spec).mean[kl] / weight.mean[kl]
    assert made.activations == {
        name: "int8" if ratios[name, spec] < 0.1 else "exact" for name, spec in made.specs.items()
    }
    assert set(made.activations.values()) == {"exact", "int8"}


def test_quantize_follows_the_plan_unless_told_otherwise(work, tmp_path):
    made = klfast.Plan.from_json(work / "plan.json")
    recorded = [name for name in made.specs if made.activations[name] == "int8"]
    for options, expected in (
        ((work / "plan.json",), recorded),
        ((work / "plan.json", "--activation", "auto"), recorded),
        ((work / "plan.json", "--activation", "int8"), list(made.specs)),
        ((work / "plan.json", "--activation", "exact"), []),
        (("--uniform", "int8", "--activation", "int8"), list(linears(by_name.load_model(work / "model")))),
        (("--uniform", "int8"), []),
    ):
        klf("quantize", work / "model", *options, "--out", tmp_path / "q", "--force")
        assert set(int8_layers(klfast.load_quantized(tmp_path / "q"))) == set(expected)


def test_eval_shows_what_the_activations_cost(work, tmp_path):
    compare = ("--teacher", work / "model", "--text", work / "text.txt", *FEW)
    found = {}
    for activation in ("auto", "exact"):
        folder = tmp_path / activation
        klf("quantize", work / "model", work / "plan.json", "--activation", activation, "--out", folder)
        found[activation] = json.loads(klf("eval", folder, *compare, "--json").stdout)
    made = klfast.Plan.from_json(work / "plan.json")
    count = sum(mode == "int8" for mode in made.activations.values())
    auto, exact = found["auto"], found["exact"]
    assert (auto["int8_activations"], auto["quantized_layers"]) == (count, len(made.specs))
    assert auto["kl_with_exact_activations"] == exact["kl"] != auto["kl"]
    assert exact["int8_activations"] == 0 and "kl_with_exact_activations" not in exact
    said = " ".join(klf("eval", tmp_path / "auto", *compare).stdout.split())
    assert f"{count} of {len(made.specs)}" in said and f"{exact['kl']:.6f}" in said
    alone = json.loads(klf("eval", tmp_path / "auto", "--text", work / "text.txt", *FEW, "--json").stdout)
    assert alone["int8_activations"] == count and "kl_with_exact_activations" not in alone
    plain = json.loads(klf("eval", work / "model", "--text", work / "text.txt", *FEW, "--json").stdout)
    assert "int8_activations" not in plain


def test_plan_and_report_show_them(work, tmp_path):
    command = ("plan", work / "sens.json", "--mean-bits", 6, "--activation", "auto", "--out", tmp_path / "plan.json")
    assert "int8 activations" in klf(*command).stdout
    data = json.loads(klf(*command, "--force", "--json").stdout)
    made = klfast.Plan.from_json(tmp_path / "plan.json")
    assert data["activations"]["int8"] == sum(mode == "int8" for mode in made.activations.values()) > 0
    report = json.loads(klf("report", work / "sens.json", "--plan", work / "plan.json", "--json").stdout)["tables"]
    assert {row[0]: row[4] for row in report[-1]["rows"] if row[4]} == made.activations
    titles = [one["title"] for one in json.loads(klf("report", work / "sens.json", "--json").stdout)["tables"]]
    assert "Int8 activations: mean KL by kind of layer" in titles


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("plan", "{work}/plain.json", "--mean-bits", "6", "--activation", "auto"), 1, r"sweep with activations=True"),
        (("plan", "{work}/sens.json", "--mean-bits", "6", "--activation", "int8"), 2, "not one of exact, auto"),
        (("quantize", "{work}/model", "{tmp}/plan.json", "--activation", "auto"), 1, "the plan records no activations"),
        (("quantize", "{work}/model", "--uniform", "int4", "--activation", "auto"), 2, "auto goes with a plan"),
        (("quantize", "{work}/model", "--uniform", "int4", "--activation", "fp8"), 2, "not one of exact, int8"),
    ],
)
def test_what_cannot_be_done(work, tmp_path, arguments, code, message):
    klf("plan", work / "plain.json", "--mean-bits", 6, "--out", tmp_path / "plan.json")
    arguments = [argument.format(work=work, tmp=tmp_path) for argument in arguments]
    assert message in fails(*arguments, "--out", tmp_path / "out", code=code)
    assert not (tmp_path / "out").exists()
