"""save_quantized and load_quantized: the same bits here and in compressed-tensors, and clean failures."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folder
import torch
from compressed_tensors.compressors import ModelCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from full_disk import files_of_at_most
from safetensors.torch import load_file
from saved_models import quantized, refused
from tiny_models import FAMILIES, HEADS, batch, tiny

import klfast
from klfast import Plan, QuantSpec, nn
from klfast.checkpoint.save import save_tokenizer
from klfast.core import errors
from klfast.models.head import is_head_tied
from klfast.models.linears import linears


@torch.no_grad()
@pytest.mark.parametrize(("family", "tied"), HEADS)
def test_loads_to_the_same_logits(family, tied, tmp_path):
    """In bfloat16 if the head is tied: the file's dtypes and who shares a weight are different things."""
    model, ids = quantized(family, tied, torch.bfloat16 if tied else torch.float32), batch()
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training and is_head_tied(loaded) == tied
    assert isinstance(loaded.get_input_embeddings(), nn.QuantEmbedding) == tied
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(
        torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in expected.items()
    )
    for name, buffer in model.named_buffers():  # including those that no file holds
        assert torch.equal(loaded.get_buffer(name), buffer), name


@torch.no_grad()
def test_a_loaded_model_saves_to_the_same_files(saved, tmp_path):
    klfast.save_quantized(klfast.load_quantized(saved), tmp_path / "again")
    for name in ("model.safetensors", "config.json", "klfast.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_packed_weights_are_those_of_the_file_and_outlive_it(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    loaded, expected = klfast.load_quantized(folder), klfast.load_quantized(saved).state_dict()
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [
        [int(n, 16) for n in line.split()[0].split("-")] for line in lines if str(folder / "model.safetensors") in line
    ]
    packed = [name for name in expected if name.endswith("weight_packed")]
    assert packed and all(
        any(begin <= loaded.get_buffer(name).data_ptr() < end for begin, end in places) for name in packed
    )
    klfast.save_quantized(quantized("mamba2"), folder, overwrite=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    shutil.rmtree(folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_decompresses_the_same_bits(family, tmp_path):
    model = quantized(family, experts=False)
    klfast.save_quantized(model, tmp_path / "model")
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    )
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    checked = 0
    for scheme in config.config_groups.values():
        for name in scheme.targets:
            parts = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{name}.weight")
            }
            weight, qt = (
                PackedQuantizationCompressor.decompress(parts, scheme)["weight"],
                model.get_submodule(name).quantized,
            )
            assert torch.equal(weight, qt.dequantize()) and weight.dtype == qt.scale.dtype
            checked += 1
    assert checked == len(linears(model)) - 1
    assert config.ignore == [name for name, module in linears(model).items() if not isinstance(module, nn.QuantLinear)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_loads_the_whole_model(family, tmp_path):
    """Use its own steps from a config to a model: apply, compress (modules get the packed form), fill, decompress."""
    model, ids = quantized(family, experts=False), batch()
    klfast.save_quantized(model, tmp_path / "model")
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    )
    other = tiny(family, seed=9)
    apply_quantization_config(other, config, show_progress=False)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(other)
    other.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    compressor.decompress_model(other)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("no_packed_quantizer")
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_llama(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    specs = (QuantSpec(4, 32), QuantSpec(6, 32), QuantSpec(8, -1))
    model, ids = quantized("llama", tied, specs=specs, head=not tied), batch()
    klfast.save_quantized(model, tmp_path / "model")
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("no_packed_quantizer")
def test_transformers_loads_an_untied_quantized_head(tmp_path):
    """Follow the advice in save_quantized's docstring for a model whose configuration ties the head."""
    from transformers import AutoModelForCausalLM

    model = tiny("llama", tied=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model = klfast.quantize_model(model, Plan({"lm_head": QuantSpec(8, -1)}, "uniform"))
    klfast.save_quantized(model, tmp_path / "model")
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    for loaded in (other, klfast.load_quantized(tmp_path / "model")):
        torch.testing.assert_close(loaded(batch()).logits, model(batch()).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.usefixtures("no_packed_quantizer")
def test_save_pretrained_of_a_loaded_model_records_the_quantization(tmp_path):
    """transformers reads the folder, but klfast requires its own klfast.json."""
    from transformers import AutoModelForCausalLM

    from klfast.checkpoint.compressed_tensors import model_quantization_config

    model = quantized("llama", specs=(QuantSpec(4, 32), QuantSpec(6, -1)))
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert loaded.config.quantization_config == model_quantization_config(model)
    loaded.save_pretrained(tmp_path / "plain")
    other, report = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(other(batch()).logits, model(batch()).logits, rtol=1e-4, atol=1e-4)
    refused(tmp_path / "plain", "has no klfast.json")


def test_shards(tmp_path):
    model = quantized("llama")
    klfast.save_quantized(model, tmp_path / "model", max_shard_size=20_000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert torch.equal(klfast.load_quantized(tmp_path / "model")(batch()).logits, model(batch()).logits)
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(errors.CheckpointError, match=r"model-00002.* is missing"):
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


def test_dtype_changes_everything_except_the_scales(saved):
    loaded = klfast.load_quantized(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.lm_head.weight_scale.dtype == torch.float16
    assert loaded(batch()).logits.isfinite().all()


@pytest.mark.parametrize("load", [klfast.load_quantized, klfast.load_model])
def test_dtypes_are_given_by_name_or_as_torchs(saved, load):
    for dtype in (torch.bfloat16, "bfloat16"):
        assert {p.dtype for p in load(saved, dtype=dtype).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(saved, dtype="auto").parameters()} == {torch.float32}


MEMORY = """
import resource, sys
import klfast, transformers.models.llama.modeling_llama
with open("/proc/self/clear_refs", "w") as f: f.write("5")
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
klfast.load_quantized(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory of a process")
def test_never_holds_the_float_weights(tmp_path):
    """Loading needs a fraction of the 100 MB of float32 linear weights, which are 13 MB as int4."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
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
    refuses(
        r"lm_head: .*no shorter last group, which int4-g48-sym needs at 64 inputs; plan int4-g32-sym",
        ragged,
        tmp_path / "model",
    )

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        klfast.save_quantized(model, tmp_path / "model", Broken())
    assert {path.name for path in tmp_path.iterdir()} == {"file", "home"}


def test_a_tokenizer_that_a_full_disk_stops_is_an_error_of_the_system(tmp_path):
    tokenizer = tiny_folder.save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "full").mkdir()
    with files_of_at_most(5000), pytest.raises(OSError, match=r"File too large: '.*full'"):
        save_tokenizer(tokenizer, tmp_path / "full")


def test_load_refuses_other_dtypes_and_devices(saved):
    for dtype in (torch.float64, torch.int8, "float64"):
        with pytest.raises(errors.InvalidInputError, match="dtype must be one of float32, bfloat16, float16, auto"):
            klfast.load_quantized(saved, dtype=dtype)
    with pytest.raises(errors.InvalidInputError, match="unknown device 'tpu'"):
        klfast.load_quantized(saved, "tpu")


FULL = """
import resource, signal, sys
import klfast
from saved_models import quantized
model = quantized("llama")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    klfast.save_quantized(model, sys.argv[1], overwrite=True, max_shard_size=sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "shards"), [(20_000, "5GB"), (20_000, "40KB"), (300, "5GB")])
def test_a_full_disk_leaves_the_old_folder_and_nothing_else(saved, tmp_path, limit, shards):
    """Simulate a full disk by a limit on the size of files."""
    folder = shutil.copytree(saved, tmp_path / "model")
    command = [sys.executable, "-c", FULL, folder, shards, str(limit)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(
        rf"\[Errno {errno.EFBIG}\] File too large: '{re.escape(str(folder))}(/model.*\.safetensors)?'\n", run.stdout
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in saved.iterdir()
    }


def test_a_folder_renamed_by_a_killed_overwrite_is_restored(damaged):
    """The next access restores it."""
    from klfast.checkpoint.by_name import load_model
    from klfast.core import temporaries

    beside = temporaries.name_beside(damaged)
    process, _, start = beside.name.split("-")[1:4]
    gone = beside.name.replace(f"-{process}-", "-4194305-").replace(".tmp", ".old")  # above any process id
    damaged.rename(beside.with_name(gone))
    assert klfast.load_quantized(damaged) is not None and start
    damaged.rename(beside.with_name(gone))
    klfast.save_quantized(quantized("mamba"), damaged, overwrite=True)  # recognised as written by save_quantized
    assert [path.name for path in damaged.parent.iterdir()] == [damaged.name]
    damaged.rename(beside.with_name(gone))
    assert load_model(damaged) is not None


@torch.no_grad()
def test_overwrite(tmp_path):
    first, second = quantized("mamba"), quantized("mamba2")
    (tmp_path / "model").mkdir()  # an empty folder may be replaced
    klfast.save_quantized(first, tmp_path / "model")
    with pytest.raises(errors.InvalidInputError, match="overwrite=True"):
        klfast.save_quantized(second, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    klfast.save_quantized(second, tmp_path / "model", overwrite=True)
    assert torch.equal(loaded(batch()).logits, first(batch()).logits)  # it does not read the old files any more
    assert torch.equal(klfast.load_quantized(tmp_path / "model")(batch()).logits, second(batch()).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
