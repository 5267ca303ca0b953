"""quantize_model on models unlike a Llama or a Mamba, and the attributes it sets for transformers."""

import pickle
import warnings

import pytest
import torch
import transformers
from test_apply_plan import fake_quantized, unchanged
from tiny_models import FAMILIES, WITH_EXPERTS, batch, tiny

import klfast
from klfast import Plan, QuantSpec, nn
from klfast.core import errors
from klfast.models.head import head_name, is_head_tied
from klfast.models.linears import linears
from klfast.models.matrices import matrices
from klfast.models.sizes import other_bytes, unquantizable, weight_bytes

# Shared layers ----------------------------------------------------------------------------------------------------


def zamba2():
    torch.manual_seed(0)
    config = transformers.Zamba2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=12,
        layers_block_type=["mamba", "hybrid"] * 6,
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_head_dim=16,
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_d_state=8,
        mamba_ngroups=1,
        intermediate_size=64,
        num_mem_blocks=1,
        adapter_rank=4,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_a_block_that_is_called_six_times_is_quantized_once():
    model, ids = zamba2(), batch()
    names = [name for name in linears(model) if "shared_transformer" in name]
    assert names and all("layers.1." in name for name in names), "under the first of its six names"
    plan = Plan({name: QuantSpec(4, 16) for name in linears(model) if name != "lm_head"}, "uniform")
    expected = fake_quantized(model, plan)(ids, use_cache=False).logits
    floats = sum(parameter.numel() * 2 for parameter in model.parameters())
    klfast.quantize_model(model, plan)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    modules = {
        id(module)
        for name, module in model.named_modules()
        if name.endswith("shared_transformer.feed_forward.down_proj")
    }
    assert len(modules) == 1 and isinstance(
        model.model.layers[11].shared_transformer.feed_forward.down_proj, nn.QuantLinear
    )
    assert sum(map(weight_bytes, matrices(model).values())) + other_bytes(model) < floats / 2, (
        "smaller than the model in bfloat16"
    )
    model.tie_weights()


def test_two_layers_with_one_weight_still_share_it():
    model = tiny("mamba")
    first, second = (block.mixer.in_proj for block in model.backbone.layers)
    second.weight = first.weight
    names = ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.in_proj"]
    assert names[0] in linears(model) and names[1] not in linears(model)
    biases = [first.bias, second.bias]
    expected = fake_quantized(model, Plan({names[0]: QuantSpec()}, "uniform"))(batch()).logits
    differing = Plan({names[0]: QuantSpec(8), names[1]: QuantSpec(4)}, "uniform")
    unchanged(model, differing, errors.InvalidInputError, f"{names[1]} shares its weight with {names[0]}")
    differing = Plan(dict.fromkeys(names, QuantSpec()), "uniform", activations={names[1]: "int8"})
    unchanged(model, differing, errors.InvalidInputError, "the plan has int8 for one and exact for the other")
    klfast.quantize_model(model, Plan({names[1]: QuantSpec()}, "uniform"))
    first, second = (block.mixer.in_proj for block in model.backbone.layers)
    assert first.weight_packed is second.weight_packed and [first.bias, second.bias] == biases
    with torch.no_grad():
        torch.testing.assert_close(model(batch()).logits, expected, rtol=1e-4, atol=1e-4)
    unchanged(model, Plan({names[0]: QuantSpec()}, "uniform"), errors.InvalidInputError, "quantized already")


# What transformers is told ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_save_pretrained_writes_a_folder_that_transformers_loads(tmp_path):
    model, ids = tiny("llama"), batch()
    names = [name for name in linears(model) if "v_proj" not in name]
    plan = Plan({name: QuantSpec(4, 32) if "mlp" in name else QuantSpec(8, -1) for name in names}, "uniform")
    expected = klfast.quantize_model(model, plan)(ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "tied", "layer", "spec", "activation", "why"),
    [
        ("llama", True, "lm_head", "int8-channel-sym", "exact", r"model\.embed_tokens is tied to the quantized head"),
        ("llama", False, "lm_head", "int8-channel-sym", "int8", "since lm_head rounds its input to int8"),
        ("gpt2", False, "transformer.h.1.mlp.c_fc", "int8-channel-sym", "exact", r"h\.1\.mlp\.c_fc is a Conv1D"),
        ("llama", False, "lm_head", "int4-g7-sym", "exact", "^lm_head: the file format has no shorter last group"),
    ],
)
def test_save_pretrained_says_why_transformers_could_not_load(family, tied, layer, spec, activation, why, tmp_path):
    model = klfast.quantize_model(tiny(family, tied), Plan({layer: spec}, "uniform"), activation=activation)
    model = pickle.loads(pickle.dumps(model))
    with pytest.raises(errors.InvalidInputError, match=why):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_resizing_an_embedding_that_reads_a_quantized_head_is_refused(tmp_path):
    model = klfast.quantize_model(tiny("llama", tied=True), Plan({"lm_head": "int8-channel-sym"}, "uniform"))
    klfast.save_quantized(model, tmp_path / "model")
    for each in (model, pickle.loads(pickle.dumps(model)), klfast.load_quantized(tmp_path / "model")):
        with pytest.raises(errors.InvalidInputError, match="resize the full-precision model and quantize it again"):
            each.resize_token_embeddings(70)


@pytest.mark.parametrize("family", ["mamba", "hymba", "llama"])
@torch.no_grad()
def test_tie_weights_leaves_a_tied_quantized_head_alone(family):
    model = klfast.quantize_model(tiny(family, tied=True), Plan({head_name(tiny(family)): QuantSpec()}, "uniform"))
    expected = model(batch()).logits
    model.tie_weights()
    assert is_head_tied(model) and torch.equal(model(batch()).logits, expected)


def test_tie_weights_still_ties_unquantized_layers():
    model = tiny("llama", tied=True)
    klfast.quantize_model(model, Plan({"model.layers.0.mlp.up_proj": QuantSpec()}, "uniform"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Models that cannot be quantized, or only in part -----------------------------------------------------------------


def small(config, dtype=torch.float32, **sizes):
    return transformers.AutoModelForCausalLM.from_config(config(vocab_size=64, **sizes), dtype=dtype).eval()


def test_rwkv_is_refused_only_if_it_divides_its_weights():
    sizes = dict(hidden_size=32, num_hidden_layers=4, attention_hidden_size=32, intermediate_size=48)
    plan = Plan({f"rwkv.blocks.{i}.feed_forward.value": QuantSpec(8, 16) for i in range(4)}, "uniform")
    for every in (2, 6):
        model = small(transformers.RwkvConfig, **sizes, rescale_every=every)
        unchanged(model, plan, errors.InvalidInputError, f"rescale_every={every}.*rescale_every=0")
    model = small(transformers.RwkvConfig, **sizes, rescale_every=0)
    ids = batch(1, 9)
    with torch.no_grad():
        expected = fake_quantized(model, plan)(ids).logits
        torch.testing.assert_close(klfast.quantize_model(model, plan)(ids).logits, expected, rtol=1e-4, atol=1e-4)


_SIZES = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
_HEADS = dict(head_dim=12, num_key_value_heads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: small(transformers.Gemma2Config, dtype, **_SIZES, **_HEADS),
        lambda dtype: small(transformers.Gemma3TextConfig, dtype, **_SIZES, **_HEADS),
        lambda dtype: small(transformers.BioGptConfig, dtype, **_SIZES, scale_embedding=True, tie_word_embeddings=True),
    ],
    ids=["gemma2", "gemma3", "biogpt"],
)
@torch.no_grad()
def test_a_tied_embedding_scales_its_quantized_rows(make, dtype, tmp_path):
    """The scale, 24**0.5, is not exact in bfloat16; BioGPT's is a number, the others' a tensor."""
    model, ids, spec = make(dtype), batch(), QuantSpec(4, 8)
    embedding, weight = model.get_input_embeddings(), klfast.quantize(model.get_input_embeddings().weight, spec)
    assert is_head_tied(model) and type(embedding) is not torch.nn.Embedding
    quantized = klfast.quantize_model(model, Plan({head_name(model): spec}, "uniform"))
    embedding.weight = torch.nn.Parameter(weight.dequantize(torch.float32).to(dtype))
    expected = embedding(ids)
    assert torch.equal(quantized.get_input_embeddings()(ids), expected)
    klfast.save_quantized(quantized, tmp_path / "model")
    loaded = klfast.load_quantized(tmp_path / "model")
    assert torch.equal(loaded.get_input_embeddings()(ids), expected)
    assert torch.equal(loaded(ids).logits, quantized(ids).logits)


def test_warns_how_much_cannot_be_quantized():
    model = small(
        transformers.GptOssConfig,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        num_local_experts=4,
    )
    total, experts = (sum(p.numel() * 4 for p in model.parameters() if p.dim() in dims) for dims in ((1, 2, 3), (3,)))
    assert unquantizable(model)["GptOssExperts"] == experts
    others = sum(unquantizable(model).values())
    with pytest.warns(
        UserWarning, match=f"quantize_model: {others / total:.0%} of the bytes of .* the weights of GptOssExperts "
    ) as caught:
        klfast.quantize_model(model, Plan({name: QuantSpec(8, 16) for name in linears(model)}, "uniform"))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*WITH_EXPERTS, "zamba")])
def test_all_matrices_of_the_families_can_be_quantized(family):
    assert unquantizable(tiny(family)) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        klfast.quantize_model(
            model := tiny(family), Plan({name: QuantSpec(8, 16) for name in linears(model)}, "uniform")
        )


def test_a_model_in_pefts_wrapper_is_refused():
    class PeftModel(torch.nn.Module):
        __module__ = "peft.peft_model"

    with pytest.raises(errors.InvalidInputError, match="peft's wrapper"):
        klfast.quantize_model(PeftModel(), Plan({"lm_head": QuantSpec()}, "uniform"))
