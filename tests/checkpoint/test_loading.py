"""Loading models and tokenizers by name, and the error messages."""

import json
import shutil
import sys
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS

import klfast
from klfast.checkpoint.by_name import bundled_models, load_model, load_tokenizer
from klfast.checkpoint.save import require_target
from klfast.checkpoint.tokenizer_size import warn_beyond
from klfast.core.errors import CheckpointError, InvalidInputError, KernelUnavailableError, KlfastError

IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_local_folder(original, dtype):
    model = load_model(original, dtype)
    assert model.dtype == getattr(torch, dtype) and not model.training
    assert load_tokenizer(original).decode(load_tokenizer(original)("Hello")["input_ids"]) == "Hello"


def test_bundled_models_load_in_their_stored_precision():
    for name in bundled_models():
        model = load_model(name, "auto")
        assert model.dtype == torch.bfloat16
        assert len(load_tokenizer(name)) <= model.config.vocab_size


def test_a_quantized_folder_is_loaded_as_such(original, tmp_path):
    import klfast
    from klfast.models.linears import linears

    model = load_model(original)
    name = next(iter(linears(model)))
    plan = klfast.Plan({name: klfast.QuantSpec()}, "uniform")
    klfast.save_quantized(klfast.quantize_model(model, plan), tmp_path / "quantized")
    for dtype in ("float32", "bfloat16"):
        loaded = load_model(tmp_path / "quantized", dtype)
        assert isinstance(loaded.get_submodule(name), klfast.QuantLinear)
        assert loaded.get_input_embeddings().weight.dtype == getattr(torch, dtype)
        assert loaded.get_submodule(name).weight_scale.dtype == torch.float16


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_the_tokenizer_of_a_quantized_folder_is_checked(original, tmp_path, file):
    import klfast

    plan = klfast.Plan({"lm_head": klfast.QuantSpec()}, "uniform")
    klfast.save_quantized(
        klfast.quantize_model(load_model(original), plan), tmp_path / "small", load_tokenizer(original)
    )
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(b"")  # not a part of the tokenizer
    assert load_tokenizer(tmp_path / "small")("Hello")["input_ids"]
    path = tmp_path / "small" / file
    path.write_text(path.read_text().replace("}", " }", 1))  # still valid JSON
    with pytest.raises(CheckpointError, match=f"{file} has .* bytes, but"):
        load_tokenizer(tmp_path / "small")
    path.write_text(path.read_text().replace(" }", "}", 1).replace("0", "1", 1))
    with pytest.raises(CheckpointError, match=f"{file} is not as it was saved"):
        load_tokenizer(tmp_path / "small")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file} is missing|has no config.json"):
        load_tokenizer(tmp_path / "small")


@pytest.mark.parametrize(
    ("config", "embedded"),
    [
        ({"vocab_size": 300}, None),
        ({"vocab_size": 20}, 20),
        ({"vocab_size": 300, "text_config": {"vocab_size": 20}}, 20),
        ({"vocab_size": 20, "pad_vocab_size_multiple": 16}, 32),
        ({"vocab_size": 20, "pad_vocab_size_multiple": 300}, None),
        ({}, None),
    ],
)
def test_a_tokenizer_with_more_tokens_than_the_model_is_told(folder, config, embedded):
    tokenizer = load_tokenizer(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_beyond(tokenizer, config, folder)
    told = f"the tokenizer has {len(tokenizer)} tokens, the model {embedded} embeddings"
    assert len(tokenizer) > 32 and [told in str(one.message) for one in caught] == [True] * (embedded is not None)


def test_the_tokenizer_of_a_smaller_model_is_told(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 20}))
    with pytest.warns(UserWarning, match="tokens, the model 20 embeddings"):
        load_tokenizer(folder)


def test_a_loaded_model_is_accelerated(original):
    from klfast.acceleration.patch import is_accelerated

    model = load_model(original)
    assert is_accelerated(model.backbone.layers[0].mixer) and is_accelerated(model.lm_head)


def test_without_the_extension_a_model_loads_with_a_warning(original, monkeypatch):
    from klfast import SlowPathWarning
    from klfast.acceleration.patch import is_accelerated
    from klfast.dispatch import pins, registry

    monkeypatch.setattr(registry, "has_kernel", lambda *_: False)
    monkeypatch.setattr(pins, "why_not", lambda tier: "the extension was not built.")
    with pytest.warns(SlowPathWarning, match="accelerate Mamba2ForCausalLM"):
        assert not is_accelerated(load_model(original).lm_head)


def store(names, dtype, shards=False):
    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors.update((name, tensors[name].to(dtype)) for name in names)
        if shards:
            file.unlink()
            for i, name in enumerate(sorted(tensors)):
                save_file({name: tensors[name]}, folder / f"part-{i}.safetensors", metadata={"format": "pt"})
            index = {
                "metadata": {},
                "weight_map": {name: f"part-{i}.safetensors" for i, name in enumerate(sorted(tensors))},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(tensors, file, metadata={"format": "pt"})

    return damage


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncate_generation_config(folder):
    file = folder / "generation_config.json"
    file.write_bytes(file.read_bytes()[:-5])


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[IN_PROJ]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[IN_PROJ] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def nest(file):
    return lambda folder: (folder / file).write_text("[" * 200_000)


def config_with(**entries):
    return lambda folder: (folder / "config.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged"),
        (drop_a_tensor, "lacks 1 of the model's tensors.*in_proj"),
        (reshape_a_tensor, r"in_proj.weight must have shape \[296, 64\], got \[3, 3\]"),
        (
            store([IN_PROJ], torch.int8),
            f"model.safetensors stores {IN_PROJ} as I8, but the model has floating-point.*; fetch it again",
        ),
        (store([IN_PROJ], torch.int8, shards=True), rf"part-\d+.safetensors stores {IN_PROJ} as I8"),
        (store(["backbone.norm_f.weight"], torch.float8_e4m3fn), "stores backbone.norm_f.weight as F8_E4M3"),
        (only_a_pickle, "never unpickles"),
        (truncate_generation_config, "generation_config.json is not a generation config"),
        (nest("generation_config.json"), "generation_config.json is not a generation config"),
        (break_config, "not a valid configuration"),
        (nest("config.json"), "not a valid configuration.*nested too deeply"),
        (config_with(model_type="unheard-of"), "does not know its architecture"),
        (config_with(model_type="clip"), "not a causal language model"),
        (config_with(**CONFIGS["bamba"]().to_dict()), r"lm_head.weight must have shape .*; fetch"),
        (
            config_with(model_type="x", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
            "--trust-remote-code",
        ),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_damaged_folder(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nowhere", "a/b/c", ""])
def test_no_such_folder(name):
    with pytest.raises(InvalidInputError):
        load_model(name)


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(InvalidInputError, match="is a file"):
        load_model(tmp_path / "model")


def test_hub_id_that_is_not_in_the_cache(monkeypatch, tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="local cache") as caught:
            load("klfast-test/absent", local_files_only=True)
        assert "\n" not in str(caught.value)


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(KlfastError, match=r"has no tokenizer; copy the model's tokenizer files into it$"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_truncated_tokenizer(folder, file):
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(
        CheckpointError, match=rf"the tokenizer of .*{folder.name}: {file} is not valid JSON; fetch or save it again"
    ) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_deeply_nested_tokenizer(folder, file):
    nest(file)(folder)
    with pytest.raises(
        CheckpointError, match=rf"the tokenizer of .*{folder.name}: {file} is not valid JSON; fetch or save it again"
    ) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_make(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .*; fetch or save it again") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_unknown_dtype(original):
    with pytest.raises(InvalidInputError, match="float64"):
        load_model(original, "float64")


def test_the_device_of_a_model(original, tmp_path, monkeypatch):
    """Use the meta device in place of a GPU."""
    import klfast
    from klfast.models.linears import linears

    model = load_model(original, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"} and not model.training
    with pytest.raises(InvalidInputError, match="unknown device 'tpu'; write cpu, cuda or xpu"):
        load_model(original, device="tpu")
    plan = klfast.Plan({next(iter(linears(model))): klfast.QuantSpec()}, "uniform")
    klfast.save_quantized(klfast.quantize_model(load_model(original), plan), tmp_path / "quantized")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for folder in (original, tmp_path / "quantized"):
        with pytest.raises(KernelUnavailableError, match="cuda device"):
            load_model(folder, device="cuda:1")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8(original, tmp_path, monkeypatch):
    odd = tmp_path / "m\udcff"
    shutil.copytree(original, odd)
    for use in (load_model, load_tokenizer, klfast.load_quantized, partial(require_target, overwrite=True)):
        with pytest.raises(InvalidInputError, match=r"is not UTF-8, as models' files need; rename it$"):
            use(odd)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(InvalidInputError, match="Python takes paths for ascii: set PYTHONUTF8=1, or a UTF-8 locale"):
        load_model(odd)
