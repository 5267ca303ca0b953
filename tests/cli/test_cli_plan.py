"""klfast plan, quantize and report: patterns, scales, unfinished sweeps, and unwritable --out."""

import copy
import json
import os
import re
import shlex
from dataclasses import replace

import pytest
import tiny_folder
import torch
from command_line import FEW, TEXT, fails, klf
from typer.testing import CliRunner

import klfast
from klfast.checkpoint import by_name
from klfast.cli import app, options

HEAD = "lm_head"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Create a folder with a model, a text, sensitivities and a plan."""
    folder = tmp_path_factory.mktemp("a folder")
    tiny_folder.save_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    klf("sweep", folder / "model", "--calibration", folder / "text.txt", *FEW, "--out", folder / "sens.json")
    klf("plan", folder / "sens.json", "--mean-bits", 6, "--out", folder / "plan.json")
    return folder


def plan(work, tmp_path, *arguments):
    klf("plan", work / "sens.json", *arguments, "--out", tmp_path / "plan.json", "--force")
    return klfast.Plan.from_json(tmp_path / "plan.json")


def test_layers_can_be_excluded_from_a_plan_or_given_a_precision(work, tmp_path):
    found = klfast.Sensitivities.from_json(work / "sens.json")
    assert HEAD in plan(work, tmp_path, "--mean-bits", 5).specs
    for arguments, keywords in (
        (["--exclude", HEAD], {"exclude": [HEAD]}),
        (["--layers", "in_proj", "--layers", "re:.*out_proj"], {"layers": ["in_proj", "out_proj"]}),
        (
            ["--keep", f"{HEAD}=int8-g64-sym", "--keep", "re:.*0.mixer.(?=in)=full"],
            {"keep": {HEAD: "int8-g64-sym", "layers.0.mixer.in_proj": None}},
        ),
    ):
        for method in ("optimal", "greedy"):
            made = plan(work, tmp_path, "--mean-bits", 13, "--method", method, *arguments)
            assert made == replace(klfast.plan(found, mean_bits=13, method=method, **keywords), notes=made.notes)
        assert "as asked" in made.notes[0]
    made = plan(work, tmp_path, "--mean-bits", 32, "--method", "uniform", "--exclude", HEAD)
    assert set(made.specs) == set(found.layers) - {HEAD} and {spec.bits for spec in made.specs.values()} == {8}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--keep", "lm_head"], 2, "--keep takes PATTERN=SPEC"),
        (["--keep", "=int4"], 2, "--keep takes PATTERN=SPEC"),
        (["--keep", "lm_head=int3"], 2, "'int3' is not a quantization spec"),
        (["--keep", "lm_head=int4-g64-sym", "--keep", "lm_head=full"], 2, "--keep gives 'lm_head' two precisions"),
        (
            ["--keep", "lm_head=int4-g16-sym"],
            1,
            r"lm_head was not measured at int4-g16-sym \(measured: int4-g64-sym, int8-g64-sym\)",
        ),
        (["--exclude", "lm_heat"], 1, "no linear layer matches 'lm_heat'; did you mean 'lm_head'"),
        (["--layers", "re:("], 1, "not a regular expression"),
        (["--exclude", "in_proj", "--max-bytes", "1kB"], 1, "smallest reachable is [0-9,]+ bytes under these patterns"),
    ],
)
def test_patterns_that_cannot_be_satisfied(work, tmp_path, arguments, code, message):
    budget = () if "--max-bytes" in arguments else ("--mean-bits", 13)
    assert re.search(
        message, fails("plan", work / "sens.json", *budget, *arguments, "--out", tmp_path / "plan.json", code=code)
    )
    assert not list(tmp_path.iterdir())


def test_uniform_model_without_some_layers(work, tmp_path):
    patterns = ("--layers", "*_proj", "--exclude", "layers.0.*")
    klf("quantize", work / "model", "--uniform", "int4", *patterns, "--out", tmp_path / "q")
    model = klfast.load_quantized(tmp_path / "q")
    quantized = {name for name, module in model.named_modules() if isinstance(module, klfast.QuantLinear)}
    assert quantized == {"backbone.layers.1.mixer.in_proj", "backbone.layers.1.mixer.out_proj"}
    uniform = ("quantize", work / "model", "--uniform", "int4", "--out", tmp_path / "r")
    assert "no linear layer matches 'x_proj'" in fails(*uniform, "--layers", "x_proj")


@pytest.mark.parametrize("flag", ["--layers", "--exclude"])
def test_patterns_with_a_plan_are_wrong_usage(work, tmp_path, flag):
    command = ("quantize", work / "model", work / "plan.json", flag, HEAD, "--out", tmp_path / "r")
    assert "go with --uniform" in fails(*command, code=2)


def test_quantize_uses_the_scale_of_the_plan(work, tmp_path, monkeypatch):
    calibration = ("--calibration", work / "text.txt", *FEW)
    klf("sweep", work / "model", *calibration, "--scale", "mse", "--out", tmp_path / "mse.json")
    klf("plan", tmp_path / "mse.json", "--mean-bits", 6, "--out", tmp_path / "mse-plan.json")
    assert klfast.Plan.from_json(work / "plan.json").scale == "absmax"
    made = klfast.Plan.from_json(tmp_path / "mse-plan.json")
    assert made.scale == "mse"
    klf("quantize", work / "model", tmp_path / "mse-plan.json", "--out", tmp_path / "q")
    weight = by_name.load_model(work / "model").get_submodule(name := next(iter(made.specs))).weight
    saved = klfast.load_quantized(tmp_path / "q").get_submodule(name)
    expected, other = (klfast.quantize(weight, made.specs[name], scale=scale) for scale in ("mse", "absmax"))
    assert saved.weight_scale.equal(expected.scale) and not saved.weight_scale.equal(other.scale)

    monkeypatch.setattr(by_name, "load_model", lambda *_, **__: pytest.fail("the model was loaded before the error"))
    for path, asked, its in ((work / "plan.json", "mse", "absmax"), (tmp_path / "mse-plan.json", "absmax", "mse")):
        error = fails("quantize", work / "model", path, "--scale", asked, "--out", tmp_path / "r")
        assert f"made from a sweep with scale {its}" in error
        assert f"leave scale out, or sweep with scale {asked}" in error
        with pytest.raises(klfast.core.errors.InvalidInputError, match=f"with scale {its}"):
            klfast.quantize_model(None, klfast.Plan.from_json(path), scale=asked)
    monkeypatch.undo()
    model = by_name.load_model(work / "model")
    assert klfast.quantize_model(model, made).get_submodule(name).weight_scale.equal(expected.scale)
    model = by_name.load_model(work / "model")
    by_hand = klfast.Plan({name: made.specs[name]}, "uniform")  # which has no scale
    assert klfast.quantize_model(model, by_hand).get_submodule(name).weight_scale.equal(other.scale)
    klf("quantize", work / "model", "--uniform", str(made.specs[name]), "--scale", "mse", "--out", tmp_path / "u")
    assert klfast.load_quantized(tmp_path / "u").get_submodule(name).weight_scale.equal(expected.scale)


def test_unfinished_sweeps_are_noted(work, tmp_path, monkeypatch):
    to_json = klfast.Sensitivities.to_json

    def interrupted(self, path=None, **rest):
        text = to_json(self, path, **rest)
        if len({name for name, _ in self.measurements}) == len(self.layers):
            raise KeyboardInterrupt
        return text

    (tmp_path / "text.txt").write_text(TEXT * 5)  # each window of 1,024 tokens is a part
    arguments = ["sweep", work / "model", "--calibration", tmp_path / "text.txt", "--windows", 4, "--length", 1024]
    arguments += ["--out", tmp_path / "sens.json"]
    monkeypatch.setattr(klfast.Sensitivities, "to_json", interrupted)
    assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code in (1, 130)
    monkeypatch.undo()
    partial = tmp_path / "sens.json.partial"
    found = klfast.Sensitivities.from_json(partial)

    def said(message):
        tables = json.loads(klf("report", partial, "--json").stdout)["tables"]
        assert message in tables[0]["rows"][0][0]
        command = ("plan", partial, "--max-kl", 100, "--out", tmp_path / "plan.json", "--force")
        assert message in json.loads(klf(*command, "--json").stdout)["notes"][0]
        return message in " ".join(klf(*command).stdout.replace("│", " ").split())

    assert said("the sweep is unfinished: it has measured 1 of 4 parts of the calibration text")
    found.provenance["micro_batches"][0] = 0  # as after a block of the first part
    found.measurements = {key: m for key, m in found.measurements.items() if "layers.0." in key[0]}
    found.to_json(partial)
    assert said("the sweep is unfinished: 3 of 5 layers have not been measured yet")
    found.measurements = {}
    found.to_json(partial)
    message = "hold no measurements; the sweep is unfinished: 5 of 5 layers have not been measured yet"
    assert message in fails("report", partial)
    assert message in fails("plan", partial, "--max-kl", 100, "--out", tmp_path / "none.json")


def test_report_lists_a_plan_by_layer(work, tmp_path):
    made = klfast.Plan.from_json(work / "plan.json")
    tables = json.loads(klf("report", work / "sens.json", "--plan", work / "plan.json", "--json").stdout)["tables"]
    rows = {row[0]: row for row in tables[-1]["rows"]}
    found = klfast.Sensitivities.from_json(work / "sens.json")
    assert list(rows) == list(found.layers)
    assert all(rows[name][1] == str(made.specs.get(name, "full precision")) for name in rows)
    assert sum(row[2] for row in rows.values()) + found.other_bytes == made.predicted["bytes"]
    assert sum(row[3] or 0.0 for row in rows.values()) == pytest.approx(made.predicted["kl"])
    other = replace(made, specs={"other": "int4"})
    other.to_json(tmp_path / "other.json")
    assert "different models" in fails("report", work / "sens.json", "--plan", tmp_path / "other.json")


def test_next_commands_can_be_copied(work, tmp_path):
    """Even if a folder's name holds a space or a quote."""
    out = tmp_path / "it's"
    out.mkdir()
    calibration = ("--calibration", work / "text.txt", *FEW)
    said = klf("sweep", work / "model", *calibration, "--spec", "int4", "--out", out / "s.json").stdout
    words = shlex.split(said[said.index("Next: ") :])
    assert words[1:] == ["klfast", "plan", str(out / "s.json"), "--max-bytes", "SIZE"]
    said = klf("plan", work / "sens.json", "--mean-bits", 6, "--out", out / "plan.json").stdout
    words = shlex.split(said[said.index("Next: ") :])
    assert words[1:] == ["klfast", "quantize", "MODEL", str(out / "plan.json"), "--out", "FOLDER"]
    said = klf("quantize", work / "model", out / "plan.json", "--out", out / "a model").stdout
    first, second = said[said.index("Next: ") + 6 :].rsplit(", ", 1)
    assert shlex.split(first) == ["klfast", "eval", str(out / "a model"), "--teacher", str(work / "model")]
    assert shlex.split(second) == ["klfast", "generate", str(out / "a model"), "PROMPT"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "{work}/model", "--out"),
        ("plan", "{work}/sens.json", "--mean-bits", "6", "--out"),
        ("report", "{work}/sens.json", "--out"),
        ("report", "{work}/sens.json", "--plot"),
        ("doctor", "--device", "cpu", "--out"),
    ],
)
def test_out_that_is_a_folder_is_refused_before_the_work(work, tmp_path, monkeypatch, arguments):
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(by_name, name, lambda *_, **__: pytest.fail("work has begun"))
    monkeypatch.setattr("klfast.sensitivity.merge.read", lambda *_: pytest.fail("work has begun"))
    arguments = [argument.format(work=work) for argument in arguments]
    (tmp_path / "folder.md").mkdir()
    os.mkfifo(tmp_path / "pipe.md")
    code = 2 if arguments[0] == "doctor" else 1
    said = fails(*arguments, tmp_path / "folder.md", "--force", code=code)
    assert code == 2 or f"folder.md is a folder; name a file with {arguments[-1]}" in said
    if code == 1:
        said = fails(*arguments, tmp_path / "pipe.md", "--force")
        assert f"pipe.md is not a regular file; name another {arguments[-1]}" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.md", "pipe.md"]


def test_foreign_folders_are_refused_before_the_work(work, tmp_path, monkeypatch):
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(by_name, name, lambda *_, **__: pytest.fail("work has begun"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    command = ("quantize", work / "model", "--uniform", "int4", "--force", "--out")
    assert "file is a file; name a folder with --out" in fails(*command, tmp_path / "file")
    assert "mine holds something that save_quantized did not write" in fails(*command, tmp_path / "mine")
    (tmp_path / "r" / "demo.csv").mkdir(parents=True)
    assert "a folder; name a file with --results" in fails("demo", "--results", tmp_path / "r")
    assert fails("demo", "--out", tmp_path / "mine") == f"klfast: {tmp_path / 'mine'} exists; name another --out"
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "text"


def test_keep_is_split_at_the_last_equals_sign():
    kept = options.parse_keep(["re:.*(?=in)=int8-g64-sym", "lm_head=full"])
    assert kept == {"re:.*(?=in)": klfast.QuantSpec(8, 64), "lm_head": None}
    assert options.parse_keep([]) is options.parse_keep(None) is None


def test_plans_for_second_order_rounding_are_measured_whole(work, tmp_path):
    sens, model = tmp_path / "sens.json", work / "model"
    text = ("--calibration", work / "text.txt", *FEW)
    klf("sweep", model, *text, "--spec", "int4-g32-sym", "--rounding", "gptq", "--out", sens)
    found = klfast.Sensitivities.from_json(sens)
    assert found.provenance["rounding"] == "gptq"
    assert any(spec.corrected for name, spec in found.measurements if name == HEAD)
    out = tmp_path / "plan.json"
    done = klf("plan", sens, "--mean-bits", 5, "--refine", model, "--tries", 1, *text, "--out", out)
    assert "--rounding gptq" in done.output.replace("\n", " ")
    said = " ".join(done.output.split())
    assert f"GPTQ rounds on 4 windows of {work / 'text.txt'}; plans are measured on the 4 after them." in said
    assert shlex.join(["--rounding", "gptq", *map(str, text)]) in said
    made = klfast.Plan.from_json(out)
    network = klfast.load_model(model)
    rows = torch.cat(klfast.token_batches(text[1], klfast.load_tokenizer(model), vocab_size=257, length=64))
    rounded = klfast.quantize_model(copy.deepcopy(network), made, rounding="gptq", calibration=[rows[:4]])
    own = klfast.evaluate(rounded, [rows[4:8]], network).kl
    assert made.predicted["kl_measured"] == pytest.approx(own, rel=1e-3) and any(
        "refined" in note for note in made.notes
    )
    klf("quantize", model, out, "--rounding", "gptq", *text, "--out", tmp_path / "small")
    assert klfast.load_quantized(tmp_path / "small").lm_head.spec == made.specs[HEAD]
    assert not (tmp_path / "small.partial").exists()
    again = ("plan", sens, "--mean-bits", 5, "--refine", model, "--calibration", work / "text.txt", "--length", 64)
    for windows, left in (("all", 0), (14, 1)):
        line = fails(*again, "--windows", windows, "--out", tmp_path / "none.json")
        assert re.search(f"has 15 windows of 64 tokens: if GPTQ rounds on {15 - left}, only {left} are left", line)


def test_servable_plans_leave_the_head_alone(work, tmp_path):
    made = plan(work, tmp_path, "--mean-bits", 20, "--servable")
    assert HEAD not in made.specs and made.specs
    out = ("--out", tmp_path / "plan.json", "--force")
    assert "klfast alone" not in klf("plan", work / "sens.json", "--mean-bits", 20, "--servable", *out).stdout
    assert "klfast alone can read" in klf("plan", work / "sens.json", "--mean-bits", 6, *out).stdout


def test_says_that_a_plan_quantizes_nothing(work, tmp_path):
    out, said = ("--out", tmp_path / "plan.json"), "The plan leaves every layer in full precision."
    assert said not in klf("plan", work / "sens.json", "--mean-bits", 6, *out).stdout
    assert said in klf("plan", work / "sens.json", "--max-bytes", "3GB", *out, "--force").stdout


def test_plans_by_seconds(work, tmp_path, monkeypatch):
    monkeypatch.setattr("klfast.benchkit.product_times._SECONDS", 0.0)
    timed = ("--timings", tmp_path / "timings.json", "--threads", 1)
    fastest = plan(work, tmp_path, "--max-kl", 1000, "--objective", "latency", *timed)
    seconds = fastest.predicted["seconds"]
    assert plan(work, tmp_path, "--max-seconds", seconds, *timed).predicted["seconds"] == pytest.approx(seconds)
    assert plan(work, tmp_path, "--mean-bits", 6, *timed).predicted["seconds"] >= seconds
    refused = ("plan", work / "sens.json", "--max-seconds", 1, "--out", tmp_path / "other.json", *timed)
    assert "with dtype float32, but here it is bfloat16" in fails(*refused, "--dtype", "bfloat16")
    wrong = ("plan", work / "sens.json", "--mean-bits", 6, "--objective", "latency", "--out", tmp_path / "other.json")
    assert "--objective latency goes with --max-kl or --max-seconds" in fails(*wrong, code=2)
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--calibration", "calibration"), "--calibration goes with --refine"),
        (("--windows", "32"), "--windows goes with --refine"),
        (("--length", "512"), "--length goes with --refine"),
        (("--tries", "12"), "--tries goes with --refine"),
        (("--local-files-only",), "--local-files-only goes with --refine"),
        (("--trust-remote-code",), "--trust-remote-code goes with --refine"),
        (("--dtype", "float32"), "--dtype goes with --timings, --max-seconds or --objective latency"),
    ],
)
def test_options_without_a_use_are_refused(work, tmp_path, given, said):
    command = ("plan", work / "sens.json", "--mean-bits", 6, "--out", tmp_path / "plan.json", *given)
    assert said in " ".join(fails(*command, code=2).split()) and not any(tmp_path.iterdir())


def test_top_says_nothing_about_a_plan(work, tmp_path):
    command = ("report", work / "sens.json", "--plan", work / "plan.json", "--top", 3)
    assert "--top goes with a sweep's report or --html" in " ".join(fails(*command, code=2).split())
    klf(*command, "--html", tmp_path / "page.html")


def test_pareto_measures_plans_of_many_sizes(work, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("klfast.measured_front._NEW_TOKENS", 3)
    out, picture, page = (tmp_path / name for name in ("front.json", "front.svg", "page.html"))
    arguments = ("--text", work / "text.txt", *FEW, "--plans", 3, "--threads", 1, "--out", out)
    command = ("pareto", work / "model", work / "sens.json", *arguments)
    assert "written as .png, .svg or .pdf" in fails(*command, "--plot", tmp_path / "front.gif") and not out.exists()
    said = fails(*command, "--calibration", work / "text.txt", code=2)
    assert "--calibration goes with costs from klfast sweep --rounding gptq" in " ".join(said.split())
    data = json.loads(klf(*command, "--plot", picture, "--json").stdout)
    front = klfast.Front.from_json(out)
    assert len(data["points"]["rows"]) == len(front.points) == 3 + 2 + 1
    assert front.provenance["model"] == str(work / "model") and "tokens a second" in picture.read_text()
    assert not (tmp_path / "front.json.partial").exists()
    klf("report", work / "sens.json", out, "--html", page)
    assert "Measured plans" in page.read_text() and "tokens/s" in page.read_text()


@pytest.mark.parametrize(
    ("flag", "again"), [((), "the same command"), (("--no-resume",), "the same command without --no-resume")]
)
def test_ctrl_c_in_pareto_says_how_to_continue(work, tmp_path, monkeypatch, flag, again):
    def interrupted(*_, resume, **__):
        resume.write_text("kept")
        raise KeyboardInterrupt

    monkeypatch.setattr(klfast, "measure_front", interrupted)
    out = tmp_path / "front.json"
    command = ("pareto", work / "model", work / "sens.json", "--text", work / "text.txt", *FEW, "--out", out, *flag)
    kept = f"{out}.partial keeps what is done, and {again} continues from there"
    assert klf(*command, code=130).stderr == f"klfast: stopped; {kept}.\n"
