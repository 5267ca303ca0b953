"""transformers' from_pretrained with klfast imported: packed weights stay packed and run on klfast's kernels."""

import copy
import json
import shutil

import compressed_folders
import other_process
import pytest
import torch
from compressed_folders import weights
from safetensors.torch import load_file, save_file
from saved_models import quantized, sign
from tiny_models import SOME_TIED, batch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

import klfast
from klfast import QuantLinear, errors
from klfast.integrations import packed_layers
from klfast.models.head import is_head_tied

load = AutoModelForCausalLM.from_pretrained
W4A16 = dict(weights=weights(4, True, 32))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Save a Llama with klfast, its tied head quantized."""
    folder = tmp_path_factory.mktemp("klfast") / "model"
    klfast.save_quantized(quantized("llama", tied=True, activation="int8"), folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Save a Llama with compressed-tensors, in INT4."""
    folder = tmp_path_factory.mktemp("foreign")
    compressed_folders.save(folder, **W4A16)
    return folder


def packed(model):
    """Return the number of packed layers."""
    return sum(isinstance(module, QuantLinear) for module in model.modules())


def nbytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def edit(folder, change):
    """Let ``change`` edit the quantization_config of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


# Folders of klfast -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        *((*case, torch.float32) for case in SOME_TIED),
        *((family, False, torch.bfloat16) for family in ("mamba2", "llama")),
    ],
    ids=str,
)
def test_klfasts_folder_gives_the_bits_of_load_quantized(family, tied, dtype, tmp_path):
    klfast.save_quantized(quantized(family, tied, dtype, experts=False), tmp_path / "model")
    expected = klfast.load_quantized(tmp_path / "model")
    model, report = load(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()) and not model.training
    assert packed(model) == packed(expected) > 0 and nbytes(model) == nbytes(expected)
    assert is_head_tied(model) == is_head_tied(expected)
    assert torch.equal(klfast.accelerate(model)(batch()).logits, expected(batch()).logits)
    assert nbytes(model) == nbytes(expected)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_initialisers_that_divide_out_proj_leave_it_alone(family, tmp_path):
    klfast.save_quantized(quantized(family, tied=True), tmp_path)
    expected, config = klfast.load_quantized(tmp_path), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "klfast.json").unlink()  # as another tool writes it
    (tmp_path / "config.json").write_text(json.dumps(config | {"rescale_prenorm_residual": True}))
    model = load(tmp_path)
    assert model.config.rescale_prenorm_residual and packed(model) == packed(expected) > 0
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_model_loaded_and_saved_again_is_the_same(llama, tmp_path):
    klfast.save_quantized(load(llama), tmp_path / "again")
    for name in ("model.safetensors", "config.json", "klfast.json"):
        assert (tmp_path / "again" / name).read_bytes() == (llama / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_how_layers_were_rounded_is_kept(family, tmp_path):
    model = quantized(family, tied=True, specs=(klfast.QuantSpec(4, 16),))
    for layer in [module for module in model.modules() if isinstance(module, QuantLinear)][::2]:
        layer.rounding = "gptq"
    klfast.save_quantized(model, tmp_path / "first")
    klfast.save_quantized(load(tmp_path / "first"), tmp_path / "second")
    first, second = (
        json.loads((tmp_path / name / "klfast.json").read_text())["layers"] for name in ("first", "second")
    )
    assert second == first
    assert {fact["rounding"] for fact in first.values()} == {"gptq", "nearest"}


def test_a_folder_named_from_the_current_one(llama, monkeypatch):
    monkeypatch.chdir(llama.parent)
    assert packed(load(llama.name)) == packed(load(llama)) > 0


@torch.no_grad()
def test_save_pretrained(llama, tmp_path):
    with pytest.raises(errors.InvalidInputError, match="embed_tokens is tied to the quantized head; use klfast"):
        load(llama).save_pretrained(tmp_path / "tied")
    klfast.save_quantized(quantized("llama"), tmp_path / "model")
    model = load(tmp_path / "model")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert packed(again) == packed(model) and torch.equal(again(batch()).logits, model(batch()).logits)


def test_save_pretrained_would_lose_int8_activations(tmp_path):
    klfast.save_quantized(quantized("llama", activation="int8"), tmp_path / "model")
    for model in (quantized("llama", activation="int8"), load(tmp_path / "model")):
        with pytest.raises(errors.InvalidInputError, match=r"rounds its input to int8.* use klfast\.save_quantized"):
            model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@torch.no_grad()
def test_activations_and_kernels_are_the_saved_ones(llama):
    model = load(llama)
    layer = model.model.layers[1].mlp.up_proj
    assert layer.activation == "int8" and layer.layout is klfast.load_quantized(llama).lm_head.layout
    assert klfast.explain(klfast.dequant_matmul, torch.randn(3, 64), layer.quantized).chosen != "reference"


@torch.no_grad()
def test_dtype(llama):
    model, expected = (make(llama, dtype=torch.bfloat16) for make in (load, klfast.load_quantized))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight_scale.dtype == torch.float16
    assert torch.equal(model(batch()).logits, expected(batch()).logits)


def test_generates(llama):
    ids = batch(1, 5)
    found, expected = (
        model.generate(ids, max_new_tokens=9, do_sample=False) for model in (load(llama), klfast.load_quantized(llama))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "generation_config.json").write_text("{}"), "generation_config.json has 2 bytes"),
        (lambda folder: flip(folder / "model.safetensors"), "its SHA-256 differs"),
        (lambda folder: drop(folder, "lm_head.weight_scale"), "lacks the tensor lm_head.weight_scale"),
        (lambda folder: drop(folder, "lm_head.weight_shape"), "lacks the tensor lm_head.weight_shape"),
        (lambda folder: change_shape(folder, "lm_head"), "lm_head.weight_shape is not"),
    ],
    ids=["other file", "checksum", "tensor", "shape", "another shape"],
)
def test_damaged_folders_are_refused_in_one_line(damage, match, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    damage(folder)
    with pytest.raises(errors.CheckpointError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sign(folder)


def change_shape(folder, layer):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{layer}.weight_shape"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sign(folder)


def test_a_model_without_these_layers_is_refused(llama):
    with pytest.raises(errors.CheckpointError, match="load it with the class that it was saved from"):
        AutoModel.from_pretrained(llama)


# Folders of others -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_others_folder_gives_what_it_decompresses_to(family, bits, symmetric, group_size, dtype, tmp_path):
    """transformers itself reads neither the asymmetric ones nor Mamba-2's out_proj."""
    dense = compressed_folders.save(tmp_path, family, dtype, weights=weights(bits, symmetric, group_size))
    model, report = load(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert packed(model) == sum(type(m) is torch.nn.Linear for m in dense.modules()) - 1
    assert {m.weight_scale.dtype for m in model.modules() if isinstance(m, QuantLinear)} == {dtype}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.quantized.dequantize(), dense.get_submodule(name).weight)
    found, own, truth = (each(batch()).logits.double() for each in (model, dense, copy.deepcopy(dense).double()))
    assert (found - truth).abs().max() <= 2 * (own - truth).abs().max() + 1e-6


@torch.no_grad()
def test_the_same_as_transformers_own(foreign):
    klfast.unregister_quantizer()
    try:
        own = load(foreign)
    finally:
        klfast.register_quantizer()
    model = load(foreign)
    asked = load(foreign, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert packed(own) == packed(asked) == 0 < packed(model)
    for other in (own, asked):
        torch.testing.assert_close(model(batch()).logits, other(batch()).logits, rtol=1e-4, atol=1e-4)
    assert nbytes(model) < 0.5 * nbytes(own)


@torch.no_grad()
def test_others_folder_can_be_saved_by_klfast(foreign, tmp_path):
    model = load(foreign)
    klfast.save_quantized(model, tmp_path / "model")
    again = klfast.load_quantized(tmp_path / "model")
    assert packed(again) == packed(model) and torch.equal(again(batch()).logits, model(batch()).logits)


def test_sharded_files(tmp_path):
    compressed_folders.save(tmp_path, **W4A16)
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = load(tmp_path / "shards")
    assert packed(again) == packed(model) and torch.equal(again(batch()).logits, model(batch()).logits)


def test_a_head_quantized_apart_from_its_embedding(tmp_path):
    """The configuration ties them, but the files hold both."""
    dense = compressed_folders.save(tmp_path, ignore=(), **W4A16)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load(tmp_path)
    assert isinstance(model.lm_head, QuantLinear) and not is_head_tied(model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch()).logits, dense(batch()).logits, rtol=1e-4, atol=1e-4)


# What transformers does itself -------------------------------------------------------------------------------------

FP8 = dict(weights=dict(num_bits=8, type="float", symmetric=True, strategy="channel"))
W8A8 = dict(weights=weights(8), input_activations=dict(num_bits=8, type="int", strategy="token", dynamic=True))


@torch.no_grad()
@pytest.mark.parametrize("group", [FP8, W8A8], ids=["fp8", "w8a8"])
def test_other_formats_go_transformers_way_in_silence(group, tmp_path, recwarn):
    dense = compressed_folders.save(tmp_path, **group)
    model = load(tmp_path)
    assert packed(model) == 0 and not [w for w in recwarn if w.category is klfast.SlowPathWarning]
    torch.testing.assert_close(model(batch()).logits, dense(batch()).logits, rtol=1e-4, atol=1e-4)


def quantize_activations(config):
    config["config_groups"]["group_0"]["input_activations"] = W8A8["input_activations"]


def quantize_cache(config):
    config["kv_cache_scheme"] = dict(num_bits=8, type="int", strategy="tensor", dynamic=False, symmetric=True)


def quantize_embedding(config):
    config["config_groups"]["group_0"]["targets"].append("Embedding")


def skip_a_layer(config):
    config["ignore"].append("model.layers.0.mlp.up_proj")


def take_other_groups(config):
    config["config_groups"]["group_0"]["weights"]["group_size"] = 16


def take_other_bits(config):
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 3


def take_one_scale(config):
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "tensor", "group_size": None}


def take_floats(config):
    config["config_groups"]["group_0"]["weights"]["type"] = "float"


def mix_formats(config):
    group = config["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = group | {"targets": ["re:.*up_proj"], "format": "int-quantized"}


@pytest.mark.filterwarnings("default::klfast.SlowPathWarning")
def test_what_klfast_cannot_run_goes_transformers_way_with_a_warning(foreign, tmp_path, monkeypatch):
    folder = shutil.copytree(foreign, tmp_path / "model")
    edit(folder, quantize_activations)
    with pytest.warns(klfast.SlowPathWarning, match=r"transformers' quantizer, .* does not quantize activations"):
        model = load(folder)
    assert packed(model) == 0 and "model.layers.0.mlp.up_proj.weight_packed" in model.state_dict()
    monkeypatch.setenv("KLFAST_STRICT", "1")
    with pytest.raises(errors.KernelUnavailableError, match="KLFAST_STRICT"):
        load(folder)


def put_in(folder, device_map=None):
    """Exchange the layers of a model without weights, as from_pretrained does, and return it."""
    config = AutoConfig.from_pretrained(folder)
    quantization = CompressedTensorsConfig(**config.quantization_config).quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        packed_layers.put_in(model, quantization, [str(folder / "model.safetensors")], device_map)
    except errors.KernelUnavailableError:
        assert packed(model) == 0  # transformers goes on with it
        raise
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantize_activations, "klfast does not quantize activations in the way"),
        (quantize_cache, "klfast does not quantize the cache"),
        (quantize_embedding, "model.embed_tokens is quantized, but is a .*, not an nn.Linear"),
        (skip_a_layer, "holds the packed weight of model.layers.0.mlp.up_proj, which is not a linear layer"),
        (take_other_groups, r"scale must have shape \[64, 4\]"),
        (take_other_bits, "none of the formats int4, int6, int8 has such weights"),
        (take_one_scale, "none of the formats int4, int6, int8 has such weights"),
        (take_floats, "none of the formats int4, int6, int8 has such weights"),
        (mix_formats, "some layers are in the format int-quantized"),
    ],
)
def test_reasons_to_leave_a_model_to_transformers(change, reason, foreign, tmp_path):
    folder = shutil.copytree(foreign, tmp_path / "model")
    edit(folder, change)
    with pytest.raises(errors.KernelUnavailableError, match=reason):
        put_in(folder)


@pytest.mark.parametrize("device_map", [{"": "mps"}, {"lm_head": torch.device("mps")}], ids=str)
def test_devices_without_kernels_are_left_to_transformers(device_map, foreign):
    with pytest.raises(errors.KernelUnavailableError, match="klfast has no mps kernel"):
        put_in(foreign, {"model": "cpu", **device_map})


@pytest.mark.parametrize("device_map", [None, "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_devices_with_kernels(device_map, foreign):
    assert packed(put_in(foreign, device_map)) == 14


# Taking transformers' place -----------------------------------------------------------------------------------------

KIND = "print(auto.AUTO_QUANTIZER_MAPPING['compressed-tensors'].__name__)"


@pytest.mark.slow
def test_before_transformers_is_imported():
    code = f"""
    import sys
    import klfast
    assert "transformers" not in sys.modules
    klfast.unregister_quantizer()
    klfast.register_quantizer()
    klfast.register_quantizer()
    import transformers.quantizers.auto as auto
    assert "klfast.ops" not in sys.modules  # until a model needs it
    {KIND}
    klfast.unregister_quantizer()
    {KIND}
    klfast.register_quantizer()
    {KIND}
    """
    assert other_process.run(code).split() == ["PackedQuantizer", "CompressedTensorsHfQuantizer", "PackedQuantizer"]


@pytest.mark.slow
def test_after_transformers_is_imported():
    code = f"""
    import transformers.quantizers.auto as auto
    {KIND}
    import klfast
    {KIND}
    """
    assert other_process.run(code).split() == ["CompressedTensorsHfQuantizer", "PackedQuantizer"]


@pytest.mark.slow
def test_turned_off_before_transformers_is_imported():
    code = f"""
    import klfast
    klfast.unregister_quantizer()
    import transformers.quantizers.auto as auto
    {KIND}
    """
    assert other_process.run(code).split() == ["CompressedTensorsHfQuantizer"]
