"""The command line on files: the whole pipeline, JSON, exit codes and error messages."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_folder
import torch
import typer
from command_line import FEW, TEXT, fails, klf
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import klfast
from klfast import planning
from klfast.checkpoint import by_name
from klfast.cli import app, options, output
from klfast.core import lock, machine
from klfast.core.progress import reporter
from klfast.sensitivity import run as sweep_run
from klfast.sensitivity.results import METRICS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Create a folder with two models, a text, sensitivities, a plan and the first model quantized by it."""
    folder = tmp_path_factory.mktemp("work")
    tiny_folder.save_model(folder / "model")
    tiny_folder.save_model(folder / "other", layers=3)
    (folder / "text.txt").write_text(TEXT)
    klf("sweep", folder / "model", "--calibration", folder / "text.txt", *FEW, "--out", folder / "sens.json")
    klf("plan", folder / "sens.json", "--mean-bits", 6, "--out", folder / "plan.json")
    klf("quantize", folder / "model", folder / "plan.json", "--out", folder / "small")
    return folder


def test_pipeline_leaves_only_finished_files(work):
    assert sorted(p.name for p in work.iterdir()) == ["model", "other", "plan.json", "sens.json", "small", "text.txt"]
    found = klfast.Sensitivities.from_json(work / "sens.json")
    assert found.provenance["model"] == str(work / "model")
    assert {str(spec) for _, spec in found.measurements} == {"int4-g64-sym", "int8-g64-sym"}


def test_sizes_are_those_of_the_stored_precision(tmp_path, work):
    by_name.load_model(work / "model").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_folder.save_tokenizer(tmp_path / "half")
    klf("sweep", tmp_path / "half", "--calibration", work / "text.txt", *FEW, "--out", tmp_path / "sens.json")
    full, half = (klfast.Sensitivities.from_json(folder / "sens.json") for folder in (work, tmp_path))
    assert full.other_bytes == 2 * half.other_bytes
    assert all(full.layers[name].float_bytes == 2 * info.float_bytes for name, info in half.layers.items())
    klf("plan", tmp_path / "sens.json", "--mean-bits", 6, "--out", tmp_path / "plan.json")
    predicted = json.loads((tmp_path / "plan.json").read_text())["predicted"]["bytes"]
    made = json.loads(
        klf("quantize", tmp_path / "half", tmp_path / "plan.json", "--out", tmp_path / "small", "--json").stdout
    )
    file = tmp_path / "small" / "model.safetensors"
    assert predicted == made["bytes"] == sum(tensor.nbytes for tensor in load_file(file).values())
    assert predicted < made["weight_file_bytes"] == file.stat().st_size  # the file's header


def test_eval_and_teacher(work):
    compare = ("eval", work / "small", "--teacher", work / "model", "--text", work / "text.txt")
    data = json.loads(klf(*compare, *FEW, "--json").stdout)
    assert data["tokens"] == 4 * 63 and data["perplexity"] > 1
    assert 0 < data["kl"] < 1 and 0 < data["top1_agreement"] <= 1
    alone = json.loads(klf("eval", work / "model", "--text", work / "text.txt", *FEW, "--json").stdout)
    assert "kl" not in alone
    assert "perplexity" in klf("eval", work / "model", "--text", work / "text.txt", *FEW).stdout
    assert "+-" in klf(*compare, "--length", 64, "--windows", 2).stdout
    one = klf(*compare, "--length", 64, "--windows", 1).stdout  # which has no standard error
    assert "nats per token" in one and "nan" not in one


def test_generate_is_repeatable_and_its_text_follows_the_prompt(work):
    arguments = ("generate", work / "small", "Once", "--max-new-tokens", 6)
    data = json.loads(klf(*arguments, "--json").stdout)
    assert len(data["token_ids"]) <= 6
    assert klf(*arguments).stdout.strip() == (data["prompt"] + data["text"]).strip()
    drawn = [klf(*arguments, "--temperature", 1.0, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "{work}/model", "--calibration", "{work}/text.txt", *FEW, "--spec", "int4", "--out", "{tmp}/s.json"),
        ("plan", "{work}/sens.json", "--max-bytes", "1MB", "--out", "{tmp}/p.json"),
        ("quantize", "{work}/model", "--uniform", "int8-g64-sym", "--out", "{tmp}/q"),
        ("doctor",),
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_is_alone_on_standard_output(work, tmp_path, arguments):
    arguments = [argument.format(work=work, tmp=tmp_path) for argument in arguments]
    assert isinstance(json.loads(klf(*arguments, "--json").stdout), dict)


def test_report_of_a_sweep_and_of_a_plan(work, tmp_path):
    tables = json.loads(klf("report", work / "sens.json", "--top", 3, "--json").stdout)["tables"]
    assert tables[0]["title"] == "Most sensitive layers" and len(tables[0]["rows"]) == 6
    assert "in_proj" in klf("report", work / "sens.json", "--plan", work / "plan.json").stdout
    files = ("--out", tmp_path / "report.md", "--plot", tmp_path / "plot.svg")
    assert klf("report", work / "sens.json", *files).stdout == f"Written: {files[1]}, {files[3]}\n"
    assert "| lm_head |" in (tmp_path / "report.md").read_text() and (tmp_path / "plot.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [("--out", "t.txt", "a report is written as .md or .json"), ("--plot", "p.gif", "a plot is written as .png, .svg")],
)
def test_a_report_of_another_suffix_leaves_no_page(work, tmp_path, option, name, message):
    line = fails("report", work / "sens.json", "--html", tmp_path / "page.html", option, tmp_path / name)
    assert message in line and not any(tmp_path.iterdir())


def test_several_files_are_merged(work, tmp_path):
    whole = klfast.Sensitivities.from_json(work / "sens.json")
    for bits in (4, 8):
        part = {key: m for key, m in whole.measurements.items() if key[1].bits == bits}
        replace(whole, measurements=part).to_json(tmp_path / f"{bits}.json")
    both = (tmp_path / "4.json", tmp_path / "8.json")
    klf("plan", *both, "--mean-bits", 6, "--out", tmp_path / "plan.json")
    assert klfast.Plan.from_json(tmp_path / "plan.json") == klfast.Plan.from_json(work / "plan.json")
    assert "again; leave one" in fails("plan", *both, both[0], "--mean-bits", 6, "--out", tmp_path / "none.json")
    assert "perplexity" in klfast.Plan.from_json(work / "plan.json").predicted
    eight = klfast.Sensitivities.from_json(both[1])
    eight.provenance["calibration_sha256"] = "another text"
    eight.to_json(tmp_path / "text.json")
    klf("plan", both[0], tmp_path / "text.json", "--mean-bits", 6, "--out", tmp_path / "texts.json")
    assert "perplexity" not in klfast.Plan.from_json(tmp_path / "texts.json").predicted
    replace(whole, other_bytes=1).to_json(tmp_path / "other.json")
    assert "different models" in fails(
        "plan", both[0], tmp_path / "other.json", "--mean-bits", 6, "--out", tmp_path / "none.json"
    )


def test_uniform_quantizes_every_linear_layer(work, tmp_path):
    data = json.loads(klf("quantize", work / "model", "--uniform", "int4", "--out", tmp_path / "q", "--json").stdout)
    assert data["quantized_layers"] == data["layers"]


def test_same_command_continues_from_the_partial_file(work, tmp_path, monkeypatch):
    out = tmp_path / "sens.json"
    arguments = ("sweep", work / "model", "--calibration", work / "text.txt", *FEW, "--out", out)
    whole = klfast.Sensitivities.from_json(work / "sens.json")
    to_json, seen = klfast.Sensitivities.to_json, []

    def interrupted(self, path=None, **rest):
        text = to_json(self, path, **rest)
        seen.append(len(self.measurements))
        if len(seen) == 2:  # the first call precedes all measurements
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(klfast.Sensitivities, "to_json", interrupted)
    assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code in (1, 130)
    assert [p.name for p in tmp_path.iterdir()] == ["sens.json.partial"]
    partial = tmp_path / "sens.json.partial"
    before = partial.read_text()
    assert json.loads(before)["sweep"]["next"] != [0, 0]
    assert re.search("with other specs; .*--no-resume", fails(*arguments, "--spec", "int4"))
    assert partial.read_text() == before  # it may hold hours of work
    monkeypatch.setattr(klfast.Sensitivities, "to_json", to_json)

    def finish(*more):
        """Run the sweep to its end and return how many steps had been done before."""
        starts = []
        monkeypatch.setattr(
            sweep_run,
            "reporter",
            lambda progress, what, total, done: starts.append(done) or reporter(progress, what, total, done),
        )
        resumed = json.loads(klf(*arguments, *more, "--json").stdout)["resumed"]
        assert resumed == (starts[0] > 0)
        assert [p.name for p in tmp_path.iterdir()] == ["sens.json"]
        assert klfast.Sensitivities.from_json(out).measurements == whole.measurements
        out.unlink()
        partial.write_text(before)
        return starts[0]

    assert finish() > 0 and finish("--no-resume") == 0
    with lock.held(partial):  # another process is working on it
        assert "another process" in fails(*arguments, "--no-resume")
    assert partial.read_text() == before
    partial.write_text(before[:-40])
    assert re.search(r"sens\.json\.partial is truncated or not valid JSON.*--no-resume", fails(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep", "{work}/nowhere"), "no model folder"),
        (("sweep", "{work}/model", "--calibration", "{tmp}/empty.txt"), "empty.txt is empty"),
        (("sweep", "{work}/model", "--calibration", "{tmp}/none.txt"), "no file"),
        (("sweep", "{work}/model", "--out", "{tmp}/no/folder/s.json"), "does not exist"),
        (("plan", "{work}/sens.json", "--max-bytes", "1kB"), "budget|smallest"),
        (("plan", "{tmp}/none.json", "--mean-bits", "5"), "none.json"),
        (("plan", "{tmp}/cut.json", "--mean-bits", "5"), "cut.json"),
        (("plan", "{work}/sens.json", "--mean-bits", "5", "--out", "{work}/plan.json"), "exists.*--force"),
        (
            ("quantize", "{work}/other", "{work}/plan.json", "--out", "{tmp}/q"),
            "made for a model with other layers|no linear layer",
        ),
        (("quantize", "{work}/model", "{tmp}/cut.json", "--out", "{tmp}/q"), "cut.json"),
        (("quantize", "{work}/model", "{tmp}/strange.json", "--out", "{tmp}/q"), "backbone.layers.9.nothing"),
        (("eval", "{tmp}/damaged"), "damaged"),
        (("generate", "{tmp}/damaged", "Hello"), "damaged"),
        (("generate", "{work}/model", ""), "prompt"),
        (("generate", "{tmp}/nan", "Hello"), "NaN"),
    ],
)
def test_failures_print_one_line_and_leave_no_file(work, tmp_path, monkeypatch, arguments, message):
    import shutil

    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "cut.json").write_text((work / "plan.json").read_text()[:-20])
    plan = json.loads((work / "plan.json").read_text())
    del plan["scale"], plan["sha256"]  # as in klfast 0.1.0: an edited plan does not match its digest
    plan["fingerprint"] = None
    plan["specs"]["backbone.layers.9.nothing"] = "int4-g64-sym"
    (tmp_path / "strange.json").write_text(json.dumps(plan))
    shutil.copytree(work / "small", tmp_path / "damaged")
    weights = next((tmp_path / "damaged").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-64])
    shutil.copytree(work / "model", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["backbone.norm_f.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(tmp_path)  # the folder of default outputs
    before = {p: p.stat().st_mtime_ns for folder in (work, tmp_path) for p in folder.rglob("*")}
    line = fails(*(a.format(work=work, tmp=tmp_path) for a in arguments))
    assert re.search(message, line), line
    assert before == {p: p.stat().st_mtime_ns for folder in (work, tmp_path) for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bogus",), "No such command"),
        (("sweep",), "Missing argument"),
        (("sweep", "mamba2", "--spec", "int3"), "not a quantization spec"),
        (("sweep", "mamba2", "--windows", "0"), "windows"),
        (("sweep", "mamba2", "--budget", "small"), "'small' is not one of exhaustive, adaptive"),
        (("sweep", "mamba2", "--engine", "dask"), "'dask' is not one of local, ray"),
        (("sweep", "mamba2", "--vocabulary", "half"), "'half' is neither full, sampled nor a number"),
        (("sweep", "mamba2", "--threads", "99999999999"), "'--threads'"),
        (("plan", "s.json"), "exactly one of"),
        (("plan", "s.json", "--mean-bits", "5", "--max-kl", "1"), "exactly one of"),
        (("plan", "s.json", "--max-bytes", "3 elephants"), "not a size"),
        (("plan", "s.json", "--max-bytes", "9" * 400), "more bytes than any model"),
        (("plan", "s.json", "--max-bytes", "10000000TB"), "more bytes than any model"),
        (("quantize", "mamba2", "--out", "x"), "exactly one of"),
        (("quantize", "mamba2", "plan.json", "--uniform", "int4", "--out", "x"), "exactly one of"),
        (("quantize", "mamba2", "plan.json"), "Missing option"),
        (("demo", "--no-such-option"), "No such option"),
        (("plan", "s.json", "--mean-bits", "5", "--metric", "beauty"), "'beauty' is not one of"),
        (("plan", "s.json", "--mean-bits", "5", "--method", "best"), "'best' is not one of"),
        (("report", "s.json", "--metric", "beauty"), "'beauty' is not one of"),
        (("sweep", "mamba2", "--scale", "max"), "'max' is not one of"),
        (("sweep", "mamba2", "--dtype", "int8"), "'int8' is not one of"),
        (("eval", "mamba2", "--dtype", "int8"), "'int8' is not one of"),
        (("quantize", "mamba2", "--uniform", "int4", "--out", "x", "--dtype", "int8"), "'int8' is not one of"),
        (("generate", "mamba2", "Once", "--top-p", "0"), "top-p must be above 0"),
        (("generate", "mamba2", "Once", "--top-p", "nan"), "top-p must be above 0"),
        (("generate", "mamba2", "Once", "--top-p", "1.1"), "top-p must be above 0"),
        (("generate", "mamba2", "Once", "--top-k", "-1"), "top-k"),
        (("generate", "mamba2", "Once", "--temperature", "-1"), "temperature must be 0 or more"),
        (("generate", "mamba2", "Once", "--temperature", "inf"), "temperature must be 0 or more"),
        (("generate", "mamba2", "Once", "--max-new-tokens", "0"), "max-new-tokens"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, message):
    assert message in fails(*arguments, code=2)


@pytest.mark.parametrize(
    ("parse", "names"),
    [(options.dtype_name, by_name.DTYPES), (options.method_name, planning.METHODS), (options.metric_name, METRICS)],
    ids=["dtype", "method", "metric"],
)
def test_choices_match_the_library(parse, names):
    assert [parse(name) for name in names] == list(names)
    with pytest.raises(typer.BadParameter, match=f"not one of {', '.join(names)}$"):
        parse("beauty")


@pytest.mark.parametrize(("offline", "remote"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "arguments",
    [
        ("demo",),
        ("sweep", "m"),
        ("quantize", "m", "--uniform", "int4", "--out", "q"),
        ("eval", "m"),
        ("compare", "m", "m"),
        ("study", "m"),
        ("generate", "m", "Once"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_passes_on_loading_options(arguments, offline, remote, tmp_path, monkeypatch):
    def refuse(name, *rest, device=None, gguf=None, **given):
        raise klfast.core.errors.InvalidInputError(f"asked for {given}")

    monkeypatch.setattr(by_name, "load_model", refuse)
    monkeypatch.setattr(by_name, "load_tokenizer", refuse)
    monkeypatch.setattr(by_name, "find_tokenizer", refuse)
    monkeypatch.chdir(tmp_path)
    flags = ["--local-files-only"] * offline + ["--trust-remote-code"] * remote
    asked = f"asked for {{'local_files_only': {offline}, 'trust_remote_code': {remote}}}"
    assert asked in fails(*arguments, *flags)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "{}"),
        ("eval", "{}"),
        ("eval", "{}", "--teacher", "{}"),
        ("compare", "{}", "{}"),
        ("generate", "{}", "Once"),
    ],
)
def test_models_are_loaded_on_the_device(arguments, work, tmp_path, monkeypatch):
    def load(name, dtype, device, **_):
        devices.append(device)
        if devices == devices_wanted:
            raise klfast.core.errors.InvalidInputError("enough")
        return right(name, dtype)

    right = by_name.load_model
    monkeypatch.setattr(by_name, "load_model", load)
    monkeypatch.setattr(machine, "require", lambda device: None)
    monkeypatch.chdir(tmp_path)
    devices, devices_wanted = [], ["xpu"] * arguments.count("{}")
    assert fails(*(a.format(work / "model") for a in arguments), "--device", "xpu") == "klfast: enough"
    assert devices == devices_wanted


@pytest.mark.parametrize(
    "arguments", [("sweep", "m"), ("eval", "m"), ("compare", "m", "m"), ("study", "m"), ("generate", "m", "Once")]
)
def test_missing_devices_are_refused_before_anything_is_loaded(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert "xpu device" in fails(*arguments, "--device", "xpu")
    assert "'tpu' is not one of cpu, cuda, xpu" in fails(*arguments, "--device", "tpu", code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3200000", 3_200_000),
        ("3.2MB", 3_200_000),
        ("1.5GiB", 1_610_612_736),
        ("500kb", 500_000),
        ("2 KiB", 2048),
        ("7B", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert options.parse_bytes(text) == size


COMMANDS = ("demo", "sweep", "plan", "quantize", "eval", "compare", "export", "generate", "report", "study", "doctor")


def run(*arguments, **environment):
    """Run the command line in another process."""
    command = [sys.executable, "-m", "klfast", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command):
    assert "--help" in klf(command, "--help").stdout
    assert f" {command} " in klf("--help").stdout


IMPORTED = """
import runpy, sys
sys.argv[0] = "klfast"
try:
    runpy.run_module("klfast", run_name="__main__")
finally:
    print([name for name in ("torch", "klfast.models.hymba") if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "code", "imported"),
    [
        (["--help"], 0, []),
        (["generate", "mamba"], 2, []),  # without a prompt
        (["generate", "mamba", "A", "--max-new-tokens", "1"], 0, ["torch"]),
    ],
    ids=["help", "wrong usage", "generate"],
)
def test_what_commands_import(arguments, code, imported):
    """What they do not need, of all that takes long to import, waits."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, str(imported)), done.stderr


@pytest.mark.slow
def test_command_in_another_process(work, tmp_path):
    assert run("--version").stdout == f"klfast {klfast.__version__}\n"
    done = run("eval", work / "small", "--text", work / "text.txt", *FEW, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] == 4 * 63, done.stderr
    assert done.stderr == ""
    failed = run("eval", tmp_path / "none")
    assert (failed.returncode, failed.stdout) == (1, "") and failed.stderr.count("\n") == 1
    assert run("eval").returncode == 2


def test_ctrl_c_before_a_command_begins_has_the_same_exit_code():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        output.run(interrupted)
    assert ended.value.code == 130


def test_doctor_fails_if_a_check_fails(monkeypatch):
    from klfast.benchkit import op_cases
    from klfast.dispatch import pins, registry

    wrong = op_cases.Case(
        "dequant_matmul", "a number", 1e-4, lambda: [torch.tensor([float(pins.pinned() == "reference")])]
    )
    monkeypatch.setitem(op_cases.CASES, "dequant_matmul", lambda _: [wrong])
    monkeypatch.setattr(registry, "op_names", lambda: ["dequant_matmul", "rms_norm"])
    result = klf("doctor", code=1)
    assert "dequant_matmul" in result.stdout and "FAILED" in result.stdout


def test_script_and_package_are_declared():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'klfast = "klfast.cli:main"' in project and '"klfast.cli",' in project
