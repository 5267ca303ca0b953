"""klfast.load_model on compressed-tensors folders of others."""

import copy
import json

import compressed_folders
import pytest
import torch
from compressed_folders import weights
from safetensors.torch import load_file, save_file
from tiny_models import assert_no_further, batch

import klfast
from klfast import QuantLinear, errors, load_model
from klfast.acceleration.patch import is_accelerated

SCALE = "model.layers.1.mlp.up_proj.weight_scale"


@pytest.fixture
def folder(tmp_path):
    compressed_folders.save(tmp_path, weights=weights(4, True, 32))
    return tmp_path


def refused(folder, match, error=errors.CheckpointError):
    with pytest.raises(error, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["config_groups"]["group_0"])
    (folder / "config.json").write_text(json.dumps(config))


def change_tensor(folder, name, tensor=None):
    """Replace a tensor, or remove it."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    more = {} if tensor is None else {name: tensor}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "mamba2", "lfm2"])
def test_the_decompressed_model_on_klfasts_layers(family, bits, symmetric, dtype, tmp_path):
    dense = compressed_folders.save(tmp_path, family, weights=weights(bits, symmetric, 16))
    model = load_model(tmp_path, dtype)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == sum(type(module) is torch.nn.Linear for module in dense.modules()) - 1  # the head
    for name, layer in layers.items():
        assert torch.equal(layer.quantized.dequantize(), dense.get_submodule(name).weight), name
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert any(map(is_accelerated, model.modules())) == (family != "llama") and model.dtype == getattr(torch, dtype)
    truth = copy.deepcopy(dense).double()(batch()).logits
    plain = copy.deepcopy(dense).to(model.dtype)
    assert_no_further(model(batch()).logits, plain(batch()).logits, truth)
    if dtype == "float32":
        assert torch.equal(klfast.generate(model, batch(), 8), klfast.generate(dense, batch(), 8))


@torch.no_grad()
def test_quantized_and_sharded_folders(folder, tmp_path):
    model = load_model(folder)
    klfast.unaccelerate(model).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    again = load_model(tmp_path / "shards")
    assert len(shards) > 2 and torch.equal(again(batch()).logits, load_model(folder)(batch()).logits)
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    refused(tmp_path / "shards", rf"{shards[1].name} is damaged \(.*\); fetch or save it again")
    shards[1].unlink()
    refused(tmp_path / "shards", rf"lacks {shards[1].name}, which model.safetensors.index.json lists")


def test_a_missing_scale(folder):
    change_tensor(folder, SCALE)
    refused(folder, rf"lacks the tensor {SCALE}; fetch or save it again")


def test_a_scale_of_another_shape(folder):
    change_tensor(folder, SCALE, torch.ones(96, 1))
    refused(folder, r"layers\.1\.mlp\.up_proj do not fit: scale must have shape \[96, 2\].*; fetch or save it again")


def test_a_missing_norm(folder):
    change_tensor(folder, "model.norm.weight")
    refused(folder, r"lacks 1 of the model's tensors, such as model\.norm\.weight; fetch or save it again")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(input_activations=dict(num_bits=8, type="int", strategy="token", dynamic=True)), "quantize activations"),
        (dict(weights=weights(3, True, 32)), "none of the formats int4, int6, int8 has such weights"),
        (dict(weights=weights(4, True, 32, "float")), "none of the formats int4, int6, int8 has such weights"),
    ],
    ids=["activations", "3 bits", "floats"],
)
def test_what_klfast_does_not_run(change, reason, folder):
    edit(folder, lambda group: group.update(change))
    for _ in range(2):  # a warning would be given only once
        refused(folder, rf"cannot load the model of .*{reason}.*; load the full-precision model instead")


def test_a_config_without_groups(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["config_groups"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "quantized with compressed-tensors|holds weights that another tool has quantized|holds the packed")


def test_without_the_package(folder, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_compressed_tensors_available", lambda: False)
    refused(folder, r"needs the package compressed-tensors.*klfast\[compressed-tensors\]", errors.InvalidInputError)


def test_without_the_quantizer(folder):
    klfast.unregister_quantizer()
    try:
        refused(folder, r"needs klfast's quantizer; call klfast\.register_quantizer", errors.InvalidInputError)
    finally:
        klfast.register_quantizer()
