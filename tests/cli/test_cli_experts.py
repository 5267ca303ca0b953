"""A precision for each expert on the command line, from the sweep to the quantized folder."""

import json

import pytest
import tiny_folder
from command_line import TEXT, fails, klf
from tiny_models import CONFIGS, made

import klfast
from klfast.models.matrices import split_stacks


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_from_a_sweep_to_a_folder(rounding, tmp_path):
    made(CONFIGS["lfm2_moe"](), "lfm2_moe", vocabulary=257).save_pretrained(tmp_path / "model")
    tiny_folder.save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    text = ("--calibration", tmp_path / "text.txt", "--windows", 4, "--length", 32)
    specs = ("--spec", "int4-channel-sym", "--spec", "int8-channel-sym")
    sens, plan, out = tmp_path / "sens.json", tmp_path / "plan.json", tmp_path / "out"
    chosen = ("--experts", "--layers", "experts.down_proj")
    klf("sweep", tmp_path / "model", *text, *specs, *chosen, "--out", sens)
    found = klfast.Sensitivities.from_json(sens)
    stack = "model.layers.1.feed_forward.experts.down_proj"
    assert {name for name, _ in found.measurements} == {
        f"model.layers.{layer}.feed_forward.experts.down_proj.{i}" for layer in (1, 2) for i in range(4)
    }
    keep = ("--keep", f"{stack}.2=int8-channel-sym", "--keep", f"{stack}.3=full")
    klf("plan", sens, "--max-bytes", 10**9, *keep, "--out", plan)
    made_plan = klfast.Plan.from_json(plan)
    assert made_plan.specs[f"{stack}.2"].bits == 8 and f"{stack}.3" not in made_plan.specs
    klf("report", sens, "--plan", plan, "--out", tmp_path / "report.md")
    assert f"{stack}.2" in (tmp_path / "report.md").read_text()
    how = ("--rounding", rounding, *(text if rounding == "gptq" else ()))
    shown = json.loads(klf("quantize", tmp_path / "model", plan, *how, "--out", out, "--json").stdout)
    assert shown["quantized_layers"] <= shown["layers"]
    model = klfast.load_quantized(out)
    assert split_stacks(model)[stack].full == [i for i in range(4) if f"{stack}.{i}" not in made_plan.specs]
    evaluated = json.loads(klf("eval", out, "--text", tmp_path / "text.txt", "--length", 32, "--json").stdout)
    assert evaluated["quantized_layers"] == shown["quantized_layers"]
    klf("generate", out, "A small", "--max-new-tokens", 4)
    for format in ("gguf", "llama-quantize"):
        assert "different precisions" in fails("export", out, "--format", format, "--out", tmp_path / "m.gguf")
