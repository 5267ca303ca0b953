"""Saved models with shared tensors: in memory, by the configuration, or both."""

import json

import pytest
import torch
from safetensors.torch import load_file
from saved_models import sign
from tiny_models import batch, tiny
from torch import nn

import klfast
from klfast import Plan, QuantSpec
from klfast.core import errors
from klfast.models.head import head_name, is_head_tied
from klfast.models.linears import linears
from klfast.models.matrices import matrices, sharers
from klfast.models.sizes import other_bytes, weight_bytes

FAMILIES = ("mamba", "mamba2", "hymba", "llama")


def quantize(model, names=None):
    """Quantize every layer except the head, or those named."""
    names = [name for name in linears(model) if name != head_name(model)] if names is None else names
    return klfast.accelerate(klfast.quantize_model(model, Plan(dict.fromkeys(names, QuantSpec(4, 32)), "uniform")))


@torch.no_grad()
def saves_and_loads(model, folder):
    """Compare the logits of both, and each float tensor, bit for bit."""
    klfast.save_quantized(model, folder)
    loaded = klfast.load_quantized(folder)
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert is_head_tied(loaded) == is_head_tied(model) == loaded.config.tie_word_embeddings
    return loaded


def untie(model):
    model.get_output_embeddings().weight = nn.Parameter(torch.randn_like(model.get_output_embeddings().weight))
    assert not is_head_tied(model)


def tie(model):
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert is_head_tied(model)


@pytest.mark.parametrize("head", [False, True], ids=["float head", "quantized head"])
@pytest.mark.parametrize("configured", [False, True], ids=["config untied", "config tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_in_memory_other_than_in_the_configuration(family, configured, head, tmp_path):
    model = tiny(family, tied=configured)
    (untie if configured else tie)(model)
    quantize(model, [head_name(model)] if head else None)
    saves_and_loads(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is not configured
    assert model.config.tie_word_embeddings is configured  # saving does not change the model


def test_a_folder_whose_file_holds_two_matrices_for_a_tied_head(tmp_path):
    """transformers loads it untied, and it stays untied when quantized, saved and loaded."""
    from klfast.checkpoint.by_name import load_model

    original = tiny("mamba", tied=False)
    original.save_pretrained(tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = load_model(tmp_path / "original")
    assert not is_head_tied(model)
    saves_and_loads(quantize(model), tmp_path / "model")


@pytest.mark.parametrize("head", [False, True], ids=["float head", "quantized head"])
@torch.no_grad()
def test_folders_of_earlier_versions_that_say_tied_but_hold_both(tmp_path, head):
    model = tiny("mamba", tied=False)
    quantize(model, [head_name(model)] if head else None)
    klfast.save_quantized(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    sign(tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    assert not is_head_tied(loaded) and not loaded.config.tie_word_embeddings


def test_two_layers_that_share_one_float_weight(tmp_path):
    model = tiny("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    saves_and_loads(quantize(model, ["lm_head"]), tmp_path / "model")
    saves_and_loads(quantize(tiny("llama"), ["lm_head"]), tmp_path / "plain")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(
        stored["model.layers.0.self_attn.q_proj.weight"], stored["model.layers.1.self_attn.q_proj.weight"]
    )


def test_a_weight_and_its_transpose_in_one_storage(tmp_path):
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    attention.o_proj.weight = nn.Parameter(attention.q_proj.weight.data.t())
    saves_and_loads(quantize(model, ["lm_head"]), tmp_path / "model")


def test_tensors_that_are_parts_of_one_storage(tmp_path):
    model = tiny("llama")
    attention = model.model.layers[0].self_attn
    flat = torch.randn(2 * attention.k_proj.weight.numel())
    for i, layer in enumerate((attention.k_proj, attention.v_proj)):
        layer.weight = nn.Parameter(flat.view(2, *layer.weight.shape)[i])
    model.model.norm.weight = nn.Parameter(torch._neg_view(torch.ones(64)))
    saves_and_loads(quantize(model, ["lm_head"]), tmp_path / "model")


@pytest.mark.filterwarnings("ignore::klfast.SlowPathWarning")
@torch.no_grad()
def test_a_quantized_layer_that_blocks_share_is_stored_once(tmp_path):
    """Zamba2's attention blocks are one block that is called several times, as its configuration states."""
    model = tiny("zamba2", tied=None)
    shared = "shared_transformer.self_attn.q_proj"
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(shared)]
    assert len(names) == 2 and model.get_submodule(names[0]).weight is model.get_submodule(names[1]).weight
    quantize(model, names[:1])
    model.set_submodule(names[1], model.get_submodule(names[0]))
    ids = batch()
    klfast.save_quantized(model, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.get_submodule(names[0]) is loaded.get_submodule(names[1])
    assert sum(name.endswith("weight_packed") for name in load_file(tmp_path / "model" / "model.safetensors")) == 1
    klfast.save_quantized(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.filterwarnings("ignore:quantize_model")  # Zamba's x_proj stays as it is
@pytest.mark.parametrize("family", ["zamba", "zamba2", "zamba2_adapters"])
@torch.no_grad()
def test_shared_blocks_are_quantized_stored_and_loaded_once(family, tmp_path):
    model = tiny(family, tied=True)
    groups = sharers(model)
    klfast.quantize_model(model, Plan({group[0]: QuantSpec(4, 16) for group in groups}, "uniform"))
    klfast.save_quantized(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert sorted(name for name in stored if name.endswith(".weight_packed")) == sorted(
        f"{group[0]}.weight_packed" for group in groups
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == sum(map(weight_bytes, matrices(model).values())) + other_bytes(model)
    loaded = klfast.load_quantized(tmp_path / "model")
    assert sharers(loaded) == groups and max(map(len, groups)) > 1
    assert torch.equal(loaded(batch()).logits, klfast.accelerate(model)(batch()).logits)


def test_models_that_differ_from_their_configuration_are_refused(tmp_path):
    def refused(model, match):
        with pytest.raises(errors.InvalidInputError, match=match) as caught:
            klfast.save_quantized(model, tmp_path / "model")
        assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value) and not list(tmp_path.iterdir())

    model = quantize(tiny("llama"))
    model.extra = nn.Linear(2, 2)
    refused(model, r"could not be loaded.*model holds 2 tensors that the model does not have, such as extra\.bias")
    model = quantize(tiny("llama"))
    model.model.norm.weight = nn.Parameter(torch.ones(3))
    refused(model, r"model\.norm\.weight must have shape \[64\], got \[3\]")
    model = quantize(tiny("llama"))
    model.model.layers.append(model.model.layers[0])
    refused(model, r"quantizes model\.layers\.2\.self_attn\.q_proj, which the model does not have")
    model = quantize(tiny("llama"))
    model.model.norm.weight = nn.Parameter(torch.ones(64, device="meta"))
    refused(model, r"model\.norm\.weight is on the meta device and has no values; load the weights")
    with torch.device("meta"):
        model = tiny("llama")
    model.set_submodule("lm_head", klfast.QuantLinear.empty((61, 64), QuantSpec(4, 32)))
    refused(model, "is on the meta device")
    model = quantize(tiny("llama"))
    model.generation_config.do_sample, model.generation_config.temperature = False, -1.0
    refused(model, "transformers refuses to save model.generation_config")
