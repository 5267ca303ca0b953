"""The commands on a GGUF file."""

import json

import gguf_files
import pytest
from command_line import FEW, TEXT, fails, klf

import klfast


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "text.txt").write_text(TEXT)
    return gguf_files.write(
        folder / "m.gguf", "mamba", gguf_files.tiny("mamba", tied=True), {"*": "Q8_0", "*x*": "Q4_1"}
    )


def test_from_sweep_to_generation(path, tmp_path):
    text = path.parent / "text.txt"
    sweep = ["--calibration", text, *FEW, "--spec", "int4-g32-sym", "--layers", "in_proj", "--out", tmp_path / "s.json"]
    assert json.loads(klf("sweep", path, *sweep, "--json").stdout)["candidates"] == 2
    klf("plan", tmp_path / "s.json", "--mean-bits", "24", "--out", tmp_path / "p.json")
    klf("quantize", path, tmp_path / "p.json", "--out", tmp_path / "small")
    found = json.loads(klf("eval", tmp_path / "small", "--teacher", path, "--text", text, *FEW, "--json").stdout)
    assert 0 < found["kl"] < 1
    assert klf("generate", tmp_path / "small", "the sea", "--max-new-tokens", "2").stdout.startswith("the sea")


def test_weights_that_stay_quantized(path):
    text = path.parent / "text.txt"
    dense = json.loads(klf("eval", path, "--gguf", "dense", "--text", text, *FEW, "--json").stdout)
    result = klf("eval", path, "--text", text, *FEW, "--json")
    assert result.stderr.count("klfast: warning: ") == 1 and "expanded to float32: 2 Q4_1 " in result.stderr
    assert json.loads(result.stdout)["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    result = klf("eval", path, "--gguf", "int8-g32-asym", "--teacher", path, "--text", text, *FEW, "--json")
    assert "quantized anew to int8-g32-asym: 2 Q4_1 " in result.stderr
    assert 0 < json.loads(result.stdout)["kl"] < 1e-3
    card = json.loads(klf("compare", path, path, "--gguf", "int8-g32-asym", "--text", text, *FEW, "--json").stdout)
    assert card["figures"]["Mean KLD"]["value"] == pytest.approx(json.loads(result.stdout)["kl"], rel=1e-3)
    assert klf("generate", path, "the sea", "--max-new-tokens", "2").stdout.startswith("the sea")


def test_wrong_usage(path):
    assert "'int5' is not a quantization spec" in fails("generate", path, "Once", "--gguf", "int5", code=2)


def test_damage(path, tmp_path):
    (tmp_path / "m.gguf").write_bytes(path.read_bytes()[:1000])
    assert "fetch or save it again" in fails("eval", tmp_path / "m.gguf")
    with pytest.raises(klfast.CheckpointError):
        klfast.load_tokenizer(tmp_path / "m.gguf")
