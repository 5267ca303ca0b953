"""Folders for OpenVINO: what they hold, and what is refused in one line with nothing written."""

import json
import re
import sys

import pytest
import torch
from command_line import fails, klf
from full_disk import files_of_at_most
from openvino_runs import Run, ov
from tiny_models import tiny

import klfast
from klfast.export.openvino.nncf import scopes
from klfast.models.matrices import matrices


def planned(model, specs=("int4-g64-sym", "int8-g64-sym", None)):
    names = [name for name, one in matrices(model).items() if one.shape[1] % 64 == 0]
    chosen = {name: specs[i % len(specs)] for i, name in enumerate(names)}
    return klfast.quantize_model(model, klfast.Plan({n: s for n, s in chosen.items() if s}, "uniform"))


def test_writes_what_klfast_writes(tmp_path):
    model, tokenizer = planned(klfast.load_model("mamba")), klfast.load_tokenizer("mamba")
    klfast.save_quantized(model, tmp_path / "small", tokenizer)
    result = klf("export", tmp_path / "small", "--format", "openvino", "--out", tmp_path / "ov", "--json")
    assert json.loads(result.stdout)["kinds"] == {"i4": 9, "i8": 8}
    files = {file.name for file in (tmp_path / "ov").iterdir()}
    assert {
        "openvino_model.xml",
        "openvino_model.bin",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    } <= files
    assert "quantization_config" not in json.loads((tmp_path / "ov" / "config.json").read_text())
    prompt = tokenizer("The sea was", return_tensors="pt").input_ids
    running, ids, found = Run(tmp_path / "ov" / "openvino_model.xml"), prompt, []
    for _ in range(30):
        ids = running(ids)[:, -1:].argmax(-1)
        found.append(int(ids))
    assert found == klfast.generate(model, prompt, max_new_tokens=30)[0, prompt.shape[1] :].tolist()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    model, said = tiny("mamba"), r"OpenVINO cannot write \(.*'.*ov/openvino_model\.xml'$"
    with files_of_at_most(10_000), pytest.raises(OSError, match=said):
        klfast.export_openvino(model, tmp_path / "ov")
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bits_are_float16(tmp_path):
    model = tiny("mamba2", dtype=torch.bfloat16)
    klfast.export_openvino(model, tmp_path / "ov")
    size = (tmp_path / "ov" / "openvino_model.bin").stat().st_size
    assert size < 2.3 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    refused(model, tmp_path / "other", "lm_head has a value beyond float16")


def refused(model, path, match, **options):
    with pytest.raises(klfast.InvalidInputError, match=match) as caught:
        klfast.export_openvino(model, path, **options)
    assert "\n" not in str(caught.value) and not path.exists()


def test_families_that_the_engine_does_not_know(tmp_path):
    refused(tiny("gemma2"), tmp_path / "ov", "klfast writes no OpenVINO model of gemma2; its engine does not know the")


def test_instructions_without_nodes(tmp_path, monkeypatch):
    monkeypatch.delattr("klfast.export.openvino.recurrences.GraphRecurrences.selective_scan")
    refused(
        tiny("mamba"),
        tmp_path / "ov",
        "cannot write this mamba for OpenVINO: no nodes compute the engine's selective_scan",
    )


def test_models_that_were_changed(tmp_path):
    model = tiny("mamba")
    model.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)
    refused(model, tmp_path / "ov", r"backbone\.layers\.0\.mixer has hooks")


def test_folders_that_are_there(tmp_path):
    model, theirs = tiny("mamba"), tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "letter.txt").write_text("dear")
    with pytest.raises(klfast.InvalidInputError, match="something that export_openvino did not write"):
        klfast.export_openvino(model, theirs, overwrite=True)
    klfast.export_openvino(model, tmp_path / "ov")
    with pytest.raises(klfast.InvalidInputError, match="pass overwrite=True"):
        klfast.export_openvino(model, tmp_path / "ov")
    klfast.export_openvino(model, tmp_path / "ov", overwrite=True)
    refused(model, tmp_path / "no" / "ov", "there is no folder")


def test_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(model, path, **_):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(ov, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        klfast.export_openvino(tiny("mamba"), tmp_path / "ov")
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    refused(tiny("mamba"), tmp_path / "ov", r"not installed: pip install 'klfast\[openvino\]'")
    said = fails("export", "mamba", "--format", "openvino", "--out", tmp_path / "ov")
    assert "pip install 'klfast[openvino]'" in said


def test_an_old_package(tmp_path, monkeypatch):
    monkeypatch.setattr(ov, "__version__", "2026.2.1-21919-releases/2026/2")
    refused(tiny("mamba"), tmp_path / "ov", r"OpenVINO 2026.2.1 is too old, 2026.3 is needed: pip install -U 'klfast")


def test_ignored_scopes():
    model = planned(tiny("granite_hybrid"), ["int4-g32-sym", "int6-g32-asym", None])
    embedding = "model.embed_tokens"
    held = [*matrices(model), embedding]
    precisions = {}
    for call in json.loads(scopes(model)):
        scope = call.pop("ignored_scope")
        for name in held:
            seen = f"__module.{name}/ov_ext::linear/MatMul"
            if not any(re.fullmatch(pattern, seen) for pattern in scope["patterns"]):
                precisions[name] = call
    expected = {
        "int4": dict(mode="int4_sym", group_size=32, ratio=1.0, all_layers=True),
        "int6": dict(mode="int8_asym"),
    }
    for name, one in matrices(model).items():
        assert precisions.get(name) == (expected[str(one.holder.spec)[:4]] if one.is_quantized else None), name
    assert embedding not in precisions and len(precisions) > 3
    with pytest.raises(klfast.InvalidInputError, match="no layer of the model is quantized"):
        scopes(tiny("mamba"))
