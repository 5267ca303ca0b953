"""load_quantized refuses damaged, altered, foreign and hostile folders in one line, and runs no code from them."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import quantized, refused, sign

import klfast
from klfast.checkpoint.manifest import verified


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "klfast.json"])
def test_truncated_and_missing_files(damaged, file):
    data = (damaged / file).read_bytes()
    (damaged / file).write_bytes(data[: len(data) // 2])
    refused(damaged, rf"{file} (has \d+ bytes, but|cannot be read as JSON)")
    (damaged / file).unlink()
    refused(damaged, file)


def test_the_manifest_covers_every_saved_file(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{'version': 1}")
            (folder / "chat").mkdir()
            (folder / "chat" / "tool.jinja").write_text("{{ messages }}")

    folder = tmp_path / "model"
    klfast.save_quantized(quantized("mamba"), folder, Tokenizer())
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat/tool.jinja"}
    assert set(json.loads((folder / "klfast.json").read_text())["files"]) == names
    (folder / "README.md").write_text("Files may be added.")
    klfast.load_quantized(folder)
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-2])
        refused(folder, rf"{name} has \d+ bytes, but \d+ were saved; copy it again")
        (folder / name).write_bytes(data[:-1] + b" ")
        refused(folder, rf"{name} is not as it was saved .*; copy it again")
        (folder / name).write_bytes(data)


def test_a_generation_config_that_was_added(damaged):
    (damaged / "generation_config.json").write_text("{")
    sign(damaged)
    refused(damaged, r"generation_config\.json is not a generation config .*; copy it again")


def test_a_flipped_bit(damaged):
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(damaged, r"model\.safetensors is not as it was saved \(its SHA-256 differs\)")
    assert klfast.load_quantized(damaged, verify=False) is not None


def test_an_interrupt_leaves_files_unread(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("hashlib.sha256", lambda: SimpleNamespace(update=lambda block: read.append(len(block))))
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 32)  # without blocks on the disk
    with pytest.raises(KeyboardInterrupt), verified(tmp_path, {"files": {"large": {"sha256": ""}}}):
        raise KeyboardInterrupt
    assert sum(read) < 1 << 32


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("lm_head.weight_packed", lambda t: None, "lacks the tensor lm_head.weight_packed"),
        ("lm_head.weight_scale", lambda t: t[:-1].clone(), "tensors of lm_head do not fit: scale must have shape"),
        ("lm_head.weight_packed", lambda t: t.float(), "tensors of lm_head do not fit: packed must be torch.int32"),
        ("lm_head.weight_shape", lambda t: t.float(), r"lm_head\.weight_shape must hold integers, got torch\.float32"),
        ("lm_head.weight_shape", lambda t: t.bool(), r"lm_head\.weight_shape must hold integers, got torch\.bool"),
        ("lm_head.weight_shape", lambda t: t + 1, r"lm_head\.weight_shape is not \[61, 64\]"),
        ("backbone.layers.1.mixer.in_proj.bias", lambda t: t[1:].clone(), r"in_proj\.bias must have shape"),
        ("backbone.norm_f.weight", lambda t: None, r"lacks the tensor backbone\.norm_f\.weight"),
        (
            "backbone.norm_f.weight",
            lambda t: t[:3].clone(),
            r"backbone\.norm_f\.weight must have shape \[64\], got \[3\]",
        ),
        (
            "backbone.norm_f.weight",
            lambda t: t.long(),
            r"backbone\.norm_f\.weight must have a dtype like torch.float32, got torch.int64",
        ),
        (
            "backbone.norm_g.weight",
            lambda t: torch.ones(3),
            r"1 tensors that the model does not have, such as backbone\.norm_g",
        ),
        (
            "backbone.layers.0.mixer.in_proj.weight",
            lambda t: None,
            r"lacks the tensor backbone\.layers\.0\.mixer\.in_proj\.weight",
        ),
    ],
)
def test_wrong_tensors_with_a_valid_manifest(damaged, name, change, match):
    tensors = load_file(damaged / "model.safetensors")
    tensors[name] = change(tensors.get(name))
    save_file({k: t for k, t in tensors.items() if t is not None}, damaged / "model.safetensors")
    sign(damaged)
    refused(damaged, match)


def test_wrong_descriptions_with_a_valid_manifest(damaged):
    config = json.loads((damaged / "config.json").read_text())

    def rewrite(**changes):
        (damaged / "config.json").write_text(json.dumps({**config, **changes}))
        sign(damaged)

    group = config["quantization_config"]["config_groups"]["group_0"]
    for changes in (
        {"model_type": "nothing"},
        {"hidden_size": "wide"},
        {"hidden_size": -3},
        {"dtype": "float9"},
        {"hidden_act": "none"},
    ):
        rewrite(**changes)
        refused(damaged, "config.json does not describe a model that this transformers can build")
    rewrite(hidden_size=128)
    refused(damaged, r"weight_shape is not \[128, 128\]")
    rewrite(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (damaged / "evil.py").write_text("raise SystemExit('ran')")
    refused(damaged, "custom code")
    rewrite(quantization_config={"config_groups": {"group_0": {**group, "targets": ["lm_head", "lm_tail"]}}})
    refused(damaged, "quantizes lm_tail, which the model does not have")
    rewrite(
        quantization_config={"config_groups": {"group_0": {**group, "weights": {**group["weights"], "num_bits": 3}}}}
    )
    refused(damaged, "description of the quantized layers is damaged.*none of the formats int4, int6, int8")
    for weights in (
        {"group_size": "64"},
        {"group_size": 0},
        {"group_size": float("nan")},
        {"group_size": 10**400},
        {"group_size": [1]},
        {"num_bits": float("inf")},
        {"symmetric": 1},
    ):
        rewrite(
            quantization_config={"config_groups": {"group_0": {**group, "weights": {**group["weights"], **weights}}}}
        )
        refused(damaged, "description of the quantized layers is damaged|do not fit")
    for groups in (
        [],
        3,
        {"group_0": 3},
        {"group_0": {}},
        {"group_0": {**group, "targets": 7}},
        {"group_0": {**group, "targets": [[]]}},
    ):
        rewrite(quantization_config={"config_groups": groups})
        refused(damaged, "description of the quantized layers is damaged|does not have")
    rewrite(quantization_config={})
    refused(damaged, "description of the quantized layers is damaged")
    (damaged / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    sign(damaged)
    refused(damaged, "quantization_config")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "int32"),
        ("dtype", "load"),
        ("dtype", None),
        ("dtype", ["float32"]),
        ("activation", "int4"),
        ("activation", None),
        ("rounding", "floor"),
        ("rounding", None),
        ("rounding", ["gptq"]),
    ],
)
def test_unknown_layer_facts(damaged, key, value):
    manifest = json.loads((damaged / "klfast.json").read_text())
    manifest["layers"]["lm_head"][key] = value
    (damaged / "klfast.json").write_text(json.dumps(manifest))
    refused(damaged, f"klfast.json is damaged: the {key} of lm_head is .*not one of .*; copy it again")


def test_foreign_folders_and_later_formats(damaged, tmp_path):
    refused(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no klfast.json, so klfast.save_quantized did not write it")
    manifest = json.loads((damaged / "klfast.json").read_text())

    def with_file(name, **facts):
        return {**manifest, "files": {**manifest["files"], name: {**manifest["files"].get(name, {}), **facts}}}

    for content, match in (
        ({**manifest, "format_version": 2}, "format version 2, this klfast reads 1"),
        ({"format_version": 1}, "klfast.json is damaged"),
        (with_file("../model.safetensors", bytes=1, sha256=""), "outside the folder"),
        (with_file("/model.safetensors", bytes=1, sha256=""), "outside the folder"),
        ({**manifest, "files": {}}, "klfast.json is damaged"),
        ({**manifest, "format_version": [1]}, "klfast.json is damaged"),
        (with_file("config.json", bytes=float("inf")), "size and digest of 'config.json' are missing"),
        (with_file("config.json", bytes=float("nan")), "size and digest of 'config.json' are missing"),
        (with_file("config.json", bytes=10**400), "config.json has .* bytes, but 1000.* were saved"),
        (with_file("config.json", sha256=3), "size and digest of 'config.json' are missing"),
        (with_file("x" * 1000, bytes=1, sha256=""), "xxx is missing"),
        (with_file("a\0b", bytes=1, sha256=""), "is missing"),
        ({**manifest, "layers": []}, "klfast.json is damaged: it lists no layers"),
        ({**manifest, "layers": {"lm_head": 3}}, "the dtype of lm_head is None"),
        ({**manifest, "layers": {}}, "quantizes .*, which the model does not have"),
    ):
        (damaged / "klfast.json").write_text(json.dumps(content))
        refused(damaged, match)
    for content, match in (
        ("[]", "is not a JSON object"),
        ("9" * 5000, "cannot be read as JSON"),
        (b"\xff\xfe\xfd", "cannot be read as JSON"),
        ("{", r"cannot be read as JSON \(Expecting"),
        ("[" * 200_000, "nested too deeply"),
    ):
        (damaged / "klfast.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        refused(damaged, match)


def test_loading_does_not_unpickle(damaged):
    """A pickle instead of the tensors is refused by its digest or, if that is forged, by the safetensors reader."""
    torch.save({"lm_head.weight": torch.ones(2)}, damaged / "model.safetensors")
    refused(damaged, "has .* bytes, but")
    sign(damaged)
    refused(damaged, r"model\.safetensors is damaged")


def test_a_configuration_with_very_many_layers(damaged):
    """It is refused at once; building the layers would take hours."""
    config = json.loads((damaged / "config.json").read_text())
    for layers in (100_000, 10**12):
        (damaged / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        sign(damaged)
        start = time.monotonic()
        refused(damaged, r"config\.json describes a far larger model than the \d+ tensors stored")
        assert time.monotonic() - start < 10
