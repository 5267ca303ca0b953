"""klfast export on the command line."""

import json

import pytest
from command_line import fails, klf

import klfast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "small"
    klf("quantize", "mamba", "--uniform", "int4-g64-sym", "--layers", "in_proj", "--layers", "lm_head", "--out", out)
    return out


def test_a_quantized_folder(folder, tmp_path):
    said = json.loads(klf("export", folder, "--out", tmp_path / "m.gguf", "--json").stdout)
    assert said["architecture"] == "mamba" and said["kinds"] == {"F32": 49, "BF16": 24, "Q4_0": 9}
    assert said["bytes"] == (tmp_path / "m.gguf").stat().st_size and said["notes"] == []
    text = "The sea's 12 waves"
    assert klfast.load_tokenizer(tmp_path / "m.gguf")(text) == klfast.load_tokenizer(folder)(text)
    assert "m.gguf exists; name another --out or pass --force" in fails("export", folder, "--out", tmp_path / "m.gguf")
    shown = klf("export", folder, "--out", tmp_path / "m.gguf", "--no-tokenizer", "--force")
    assert "Note: the file has no tokenizer" in shown.stdout and "llama.cpp's mamba, " in shown.stdout


def test_types_for_llama_quantize(folder, tmp_path):
    assert "--tensor-type-file" in klf("export", folder, "--format", "llama-quantize", "--out", tmp_path / "t").stdout
    lines = (tmp_path / "t").read_text().splitlines()
    assert r"^blk\.0\.ssm_in\.weight$=q4_0" in lines and r"^token_embd\.weight$=q4_0" in lines and len(lines) == 33


def test_what_cannot_be_written(tmp_path):
    assert "klfast writes no GGUF file of hymba" in fails("export", "hymba", "--out", tmp_path / "m.gguf")
    assert "is not one of" in fails("export", "mamba", "--format", "onnx", "--out", tmp_path / "m.gguf", code=2)
    assert not list(tmp_path.iterdir())
