"""save_quantized and load_quantized: the same bits here and in compressed-tensors, and no damage that goes unnoticed."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from families import FAMILIES, batch, tiny
from safetensors.torch import load_file, save_file

import klfast
from klfast import Plan, QuantSpec, errors, nn
from klfast.models.layers import head_name, is_head_tied, linears

SPECS = (QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(4, 16, symmetric=False), QuantSpec(8, 32, symmetric=False))


def quantized(family, tied=False, dtype=torch.float32, specs=SPECS, activation="exact", head=True):
    """A tiny model with every layer but one quantized, the specs in turn; accelerated, as loaded ones are."""
    model = tiny(family, tied, dtype)
    names = [name for name in list(linears(model))[1:] if head or name != head_name(model)]
    plan = {name: klfast.types.storable_spec(specs[i % len(specs)], linears(model)[name].in_features) for i, name in enumerate(names)}
    return klfast.accelerate(klfast.quantize_model(model, Plan(plan, "uniform"), activation=activation))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved tied Mamba, to be copied before it is damaged."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    klfast.save_quantized(quantized("mamba", tied=True), folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def sign(folder):
    """Make the manifest agree with the files again, as somebody would who alters them on purpose."""
    from klfast.checkpoint_format import write_manifest

    manifest = json.loads((folder / "klfast.json").read_text())
    write_manifest(folder, **{k: v for k, v in manifest.items() if k not in ("format_version", "files")})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_to_the_same_logits(family, tied, dtype, tmp_path):
    model, ids = quantized(family, tied, dtype), batch()
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training and is_head_tied(loaded) == tied
    assert isinstance(loaded.get_input_embeddings(), nn.QuantEmbedding) == tied
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in expected.items())
    for name, buffer in model.named_buffers():  # those too that no file holds
        assert torch.equal(loaded.get_buffer(name), buffer), name


@torch.no_grad()
def test_a_loaded_model_saves_to_the_same_files(saved, tmp_path):
    klfast.save_quantized(klfast.load_quantized(saved), tmp_path / "again")
    for name in ("model.safetensors", "config.json", "klfast.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_decompresses_the_same_bits(family, tmp_path):
    model = quantized(family)
    klfast.save_quantized(model, tmp_path / "model")
    config = QuantizationConfig.model_validate(json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"])
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    checked = 0
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.weight")}
            weight, qt = PackedQuantizationCompressor.decompress(parts, scheme)["weight"], model.get_submodule(name).quantized
            assert torch.equal(weight, qt.dequantize()) and weight.dtype == qt.scale.dtype
            checked += 1
    assert checked == len(linears(model)) - 1
    assert config.ignore == [name for name, module in linears(model).items() if not isinstance(module, nn.QuantLinear)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_loads_the_whole_model(family, tmp_path):
    """Its own way from a config to a model: apply, compress (the modules take the packed form), fill, decompress."""
    model, ids = quantized(family), batch()
    klfast.save_quantized(model, tmp_path / "model")
    config = QuantizationConfig.model_validate(json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"])
    other = tiny(family, seed=9)
    apply_quantization_config(other, config, show_progress=False)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(other)
    other.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    compressor.decompress_model(other)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_llama(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = quantized("llama", tied, specs=SPECS[:2], head=not tied), batch()
    klfast.save_quantized(model, tmp_path / "model")
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_shards(tmp_path):
    model = quantized("llama")
    klfast.save_quantized(model, tmp_path / "model", max_shard_size=20_000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert torch.equal(klfast.load_quantized(tmp_path / "model")(batch()).logits, model(batch()).logits)
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(errors.CheckpointError, match="model-00002.* is missing"):
        klfast.load_quantized(tmp_path / "model")


def test_activation_generation_config_and_tokenizer_are_kept(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    model = quantized("mamba2", activation="int8")
    model.generation_config.max_new_tokens = 17
    klfast.save_quantized(model, tmp_path / "model", Tokenizer())
    loaded = klfast.load_quantized(tmp_path / "model")
    assert loaded.lm_head.activation == "int8" and loaded.generation_config.max_new_tokens == 17
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_dtype_changes_all_but_the_scales(saved):
    loaded = klfast.load_quantized(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.lm_head.weight_scale.dtype == torch.float16
    assert loaded(batch()).logits.isfinite().all()


MEMORY = """
import resource, sys
import klfast, transformers.models.llama.modeling_llama
with open("/proc/self/clear_refs", "w") as f: f.write("5")
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
klfast.load_quantized(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory of a process")
def test_never_holds_the_float_weights(tmp_path):
    """100 MB of float32 linear weights, 13 MB of them as int4: loading takes a fraction of the former."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to_empty(device="cpu")
    names = [name for name in linears(model) if name != "lm_head"]
    weights = sum(module.weight.nbytes for name, module in linears(model).items() if name in names)
    for name in names:
        n, k = linears(model)[name].weight.shape
        layer = nn.QuantLinear.empty((n, k), QuantSpec(4, 64), device="cpu")
        for buffer in (layer.weight_packed, layer.weight_scale):
            buffer.zero_()
        model.set_submodule(name, layer)
    klfast.save_quantized(model, tmp_path / "model")
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "model"], capture_output=True, text=True, check=True)
    assert weights > 100e6 and int(run.stdout) * 1024 < 0.5 * weights, run.stdout


def refused(folder, match, **options):
    with pytest.raises(errors.CheckpointError, match=match) as caught:
        klfast.load_quantized(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "klfast.json"])
def test_truncated_and_missing_files(damaged, file):
    data = (damaged / file).read_bytes()
    (damaged / file).write_bytes(data[: len(data) // 2])
    refused(damaged, rf"{file} (has \d+ bytes where|cannot be read as JSON)")
    (damaged / file).unlink()
    refused(damaged, file)


def test_every_saved_file_is_under_the_manifest(tmp_path):
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
        refused(folder, rf"{name} has \d+ bytes where \d+ were saved; copy it again")
        (folder / name).write_bytes(data[:-1] + b" ")
        refused(folder, rf"{name} is not as it was saved .*; copy it again")
        (folder / name).write_bytes(data)


def test_a_generation_config_that_was_added(damaged):
    (damaged / "generation_config.json").write_text("{")
    sign(damaged)
    refused(damaged, r"generation_config\.json is no generation config .*; copy it again")


def test_a_flipped_bit(damaged):
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(damaged, r"model\.safetensors is not as it was saved \(its SHA-256 differs\)")
    assert klfast.load_quantized(damaged, verify=False) is not None


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("lm_head.weight_packed", lambda t: None, "lacks the tensor lm_head.weight_packed"),
        ("lm_head.weight_scale", lambda t: t[:-1].clone(), "tensors of lm_head do not fit: scale must have shape"),
        ("lm_head.weight_packed", lambda t: t.float(), "tensors of lm_head do not fit: packed must be torch.int32"),
        ("lm_head.weight_shape", lambda t: t + 1, r"lm_head\.weight_shape is not \[61, 64\]"),
        ("backbone.layers.1.mixer.in_proj.bias", lambda t: t[1:].clone(), r"in_proj\.bias must have shape"),
        ("backbone.norm_f.weight", lambda t: None, r"lacks the tensor backbone\.norm_f\.weight"),
        ("backbone.norm_f.weight", lambda t: t[:3].clone(), r"backbone\.norm_f\.weight must have shape \[64\], got \[3\]"),
        ("backbone.norm_f.weight", lambda t: t.long(), r"backbone\.norm_f\.weight must be like torch.float32, got torch.int64"),
        ("backbone.norm_g.weight", lambda t: torch.ones(3), r"1 tensors that the model does not have, such as backbone\.norm_g"),
        ("backbone.layers.0.mixer.in_proj.weight", lambda t: None, r"lacks the tensor backbone\.layers\.0\.mixer\.in_proj\.weight"),
    ],
)
def test_wrong_tensors_under_a_right_manifest(damaged, name, change, match):
    tensors = load_file(damaged / "model.safetensors")
    tensors[name] = change(tensors.get(name))
    save_file({k: t for k, t in tensors.items() if t is not None}, damaged / "model.safetensors")
    sign(damaged)
    refused(damaged, match)


def test_wrong_descriptions_under_a_right_manifest(damaged):
    config = json.loads((damaged / "config.json").read_text())

    def rewrite(**changes):
        (damaged / "config.json").write_text(json.dumps({**config, **changes}))
        sign(damaged)

    group = config["quantization_config"]["config_groups"]["group_0"]
    for changes in ({"model_type": "nothing"}, {"hidden_size": "wide"}, {"hidden_size": -3}, {"dtype": "float9"}, {"hidden_act": "none"}):
        rewrite(**changes)
        refused(damaged, "config.json describes no model that this transformers can build")
    rewrite(hidden_size=128)
    refused(damaged, r"weight_shape is not \[128, 128\]")
    rewrite(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (damaged / "evil.py").write_text("raise SystemExit('ran')")
    refused(damaged, "custom code")
    rewrite(quantization_config={"config_groups": {"group_0": {**group, "targets": ["lm_head", "lm_tail"]}}})
    refused(damaged, "quantizes lm_tail, which the model does not have")
    rewrite(quantization_config={"config_groups": {"group_0": {**group, "weights": {**group["weights"], "num_bits": 3}}}})
    refused(damaged, "description of the quantized layers is damaged.*bits must be 4 or 8")
    rewrite(quantization_config={})
    refused(damaged, "description of the quantized layers is damaged")
    (damaged / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    sign(damaged)
    refused(damaged, "quantization_config")


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", "int32"), ("dtype", "load"), ("dtype", None), ("dtype", ["float32"]), ("activation", "int4"), ("activation", None)],
)
def test_unknown_layer_facts(damaged, key, value):
    manifest = json.loads((damaged / "klfast.json").read_text())
    manifest["layers"]["lm_head"][key] = value
    (damaged / "klfast.json").write_text(json.dumps(manifest))
    refused(damaged, f"klfast.json is damaged: the {key} of lm_head is .*not one of .*; copy it again")


def test_foreign_folders_and_later_formats(damaged, tmp_path):
    refused(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no klfast.json, so klfast.save_quantized did not write it")
    manifest = json.loads((damaged / "klfast.json").read_text())
    for content, match in (
        ({**manifest, "format_version": 2}, "format version 2, this klfast reads 1"),
        ({"format_version": 1}, "klfast.json is damaged"),
        ({**manifest, "files": {"../model.safetensors": {"bytes": 1, "sha256": ""}}}, "outside of the folder"),
        ({**manifest, "files": {"/model.safetensors": {"bytes": 1, "sha256": ""}}}, "outside of the folder"),
        ({**manifest, "layers": []}, "klfast.json is damaged: it lists no layers"),
        ({**manifest, "layers": {"lm_head": 3}}, "the dtype of lm_head is None"),
        ({**manifest, "layers": {}}, "quantizes .*, which the model does not have"),
    ):
        (damaged / "klfast.json").write_text(json.dumps(content))
        refused(damaged, match)
    for content, match in (("[]", "holds no JSON object"), ("{", r"cannot be read as JSON \(Expecting"), ("[" * 200_000, "nested too deeply")):
        (damaged / "klfast.json").write_text(content)
        refused(damaged, match)


def test_loading_does_not_unpickle(damaged):
    """A pickle in the place of the tensors is refused by the digest and, that forged, by the reader of safetensors."""
    torch.save({"lm_head.weight": torch.ones(2)}, damaged / "model.safetensors")
    refused(damaged, "has .* bytes where")
    sign(damaged)
    refused(damaged, r"model\.safetensors is damaged")


def test_save_refuses(tmp_path):
    def refuses(match, model, folder, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(errors.InvalidInputError, match=match):
            klfast.save_quantized(model, folder, **options)
        assert sorted(tmp_path.rglob("*")) == before

    model = quantized("mamba")
    refuses("no layer of the model is quantized", tiny("mamba"), tmp_path / "model")
    refuses("there is no folder", model, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("x")
    refuses("is a file", model, tmp_path / "file")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("x")
    refuses("did not write", model, tmp_path / "home")
    refuses("did not write", model, tmp_path / "home", overwrite=True)
    ragged = klfast.quantize_model(tiny("mamba"), Plan({"lm_head": QuantSpec(4, 48)}, "uniform"))
    refuses(r"lm_head: .*no shorter last group, which int4-g48-sym needs at 64 inputs; plan int4-g32-sym", ragged, tmp_path / "model")

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        klfast.save_quantized(model, tmp_path / "model", Broken())
    assert {path.name for path in tmp_path.iterdir()} == {"file", "home"}


@torch.no_grad()
def test_overwrite(tmp_path):
    first, second = quantized("mamba"), quantized("mamba2")
    (tmp_path / "model").mkdir()  # an empty folder is as good as none
    klfast.save_quantized(first, tmp_path / "model")
    with pytest.raises(errors.InvalidInputError, match="overwrite=True"):
        klfast.save_quantized(second, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    klfast.save_quantized(second, tmp_path / "model", overwrite=True)
    assert torch.equal(loaded(batch()).logits, first(batch()).logits)  # holds no part of the old files
    assert torch.equal(klfast.load_quantized(tmp_path / "model")(batch()).logits, second(batch()).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
