"""Models of GGUF files: the same logits as the model that was written, in the formats of the file."""

import warnings

import gguf_files
import pytest
import torch
from torch import nn

import klfast
from klfast.models.linears import linears
from klfast.models.matrices import matrices
from klfast.nn import QuantEmbedding

# Every exact type, and Q4_K, which no format of klfast's holds exactly.
KINDS = {"*": "Q8_0", "*_q.*": "Q4_0", "*gate*": "Q4_0", "*_k.*": "Q5_0", "*_up.*": "Q6_K", "*in*": "Q6_K"}
KINDS |= {"*_v.*": "IQ4_NL", "*out*": "Q4_0", "*down*": "Q4_K", "token_embd*": "Q6_K", "output.*": "Q6_K"}
KINDS |= {"*_gate_exps*": "Q6_K", "*_up_exps*": "Q6_K", "*_down_exps*": "Q4_0", "*_gate_inp*": "F32"}


@pytest.fixture(params=gguf_files.CONFIGS)
def family(request):
    return request.param


def distance(found, model):
    with torch.no_grad():
        got, want = (each(gguf_files.ids()).logits.float() for each in (found, model))
    return ((got - want).norm() / want.norm()).item()


def specs(model):
    return {name: str(layer.spec) for name, layer in model.named_modules() if isinstance(layer, klfast.QuantLinear)}


@pytest.mark.filterwarnings("ignore:.*as stored")
@pytest.mark.parametrize("tied", [False, True])
def test_logits(tmp_path, family, tied):
    model = gguf_files.tiny(family, tied)
    path = gguf_files.write(tmp_path / "m.gguf", family, model, KINDS)
    found = klfast.load_model(path, gguf="exact")
    assert distance(found, model) < 2e-5 and not found.training
    kept = {str(layer.spec) for layer in linears(found).values() if isinstance(layer, klfast.QuantLinear)}
    assert kept >= {"int4-g32-sym", "int6-g16-sym"}
    left = {
        name.rpartition(".")[2] for name, layer in linears(found).items() if not isinstance(layer, klfast.QuantLinear)
    }
    assert left <= {"down_proj", "w2", "c_proj", "shared_expert_gate"}  # Q4_K, and a router
    stacks = {name: one for name, one in matrices(found).items() if "experts." in name}
    assert all(one.is_quantized for one in stacks.values()) and bool(stacks) == ("moe" in family)
    assert isinstance(found.get_input_embeddings(), QuantEmbedding if tied else nn.Embedding)


def test_dense_weights(tmp_path, family):
    model = gguf_files.tiny(family)
    path = gguf_files.write(tmp_path / "m.gguf", family, model, KINDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*as stored")
        found = klfast.load_model(path, gguf="dense")
    assert not specs(found) and distance(found, model) < 5e-6
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


def test_other_weights_are_expanded_or_quantized_anew(tmp_path):
    model = gguf_files.tiny("llama")
    path = gguf_files.write(
        tmp_path / "m.gguf", "llama", model, {"*": "Q4_1", "blk.0.*": "Q8_0", "token_embd*": "Q8_0"}
    )
    with pytest.warns(
        UserWarning, match=r"m\.gguf .*; expanded to bfloat16: 8 Q4_1, 1 Q8_0 outside linear layers \(.*"
    ):
        found = klfast.load_model(path, "bfloat16", gguf="exact")
    assert set(specs(found).values()) == {"int8-g32-sym"} and len(specs(found)) == 7
    assert found.lm_head.weight.dtype == torch.bfloat16 and distance(found, model) < 0.03
    with pytest.warns(UserWarning, match=r"; expanded .*: 1 Q8_0 outside .*\); .* anew to int8-g32-asym: 8 Q4_1 "):
        found = klfast.load_model(path)
    assert sorted(specs(found).values()) == ["int8-g32-asym"] * 8 + ["int8-g32-sym"] * 7
    assert distance(found, model) < 0.01


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [({}, "float32"), ({"*": "F16"}, "float16"), ({"*": "BF16"}, "bfloat16"), ({"*": "Q8_0"}, "float32")],
)
def test_stored_dtypes(tmp_path, kinds, dtype):
    model = gguf_files.tiny("mamba", tied=True)
    found = klfast.load_model(gguf_files.write(tmp_path / "m.gguf", "mamba", model, kinds), "auto")
    assert found.dtype == getattr(torch, dtype)
    assert distance(found, model) < (1e-5 if dtype == "float32" else 0.03)


def test_saving(tmp_path):
    model = gguf_files.tiny("mamba", tied=True)
    path = gguf_files.write(tmp_path / "m.gguf", "mamba", model, {"*": "Q8_0", "*in*": "Q6_K", "*x*": "Q4_0"})
    found = klfast.load_model(path)
    klfast.save_quantized(found, tmp_path / "saved", klfast.load_tokenizer(path))
    again = klfast.load_quantized(tmp_path / "saved")
    assert specs(again) == specs(found) and distance(again, found) == 0
    text = "the sea"
    assert (
        klfast.load_tokenizer(tmp_path / "saved")(text)["input_ids"] == klfast.load_tokenizer(path)(text)["input_ids"]
    )


def test_a_sweep_starts_from_dense_weights(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", "mamba", gguf_files.tiny("mamba"), {"*": "Q8_0"})
    model = klfast.load_model(path, gguf="dense")
    found = klfast.sweep(model, [gguf_files.ids()], specs=["int4-g64-sym"], layers=["in_proj"])
    assert len(found.measurements) == 2
    model.save_pretrained(tmp_path / "dense")  # as any model of transformers
    assert distance(klfast.load_model(tmp_path / "dense"), model) < 1e-6


def test_tokens_and_tokenizer(tmp_path):
    path = gguf_files.write(
        tmp_path / "m.gguf", "llama", gguf_files.tiny("llama"), metadata={"tokenizer.ggml.eot_token_id": 5}
    )
    tokenizer = klfast.load_tokenizer(path)
    encoded = tokenizer("the sea")["input_ids"]
    assert [gguf_files.TOKENS[i] for i in encoded] == ["the", "Ġ", "s", "e", "a"]
    assert tokenizer.decode(encoded) == "the sea"
    model = klfast.load_model(path)
    assert model.generation_config.eos_token_id == [gguf_files.END, 5]
    assert model.generation_config.bos_token_id == gguf_files.START and model.generation_config.pad_token_id is None


def test_what_transformers_leaves_out_is_named(tmp_path):
    path, factors = tmp_path / "m.gguf", {"rope_freqs.weight": torch.ones(32).numpy()}
    gguf_files.write(path, "llama", gguf_files.tiny("llama"), metadata={"llama.rope.scaling.factor": 8.0}, **factors)
    match = r"m\.gguf has content .*; left out by transformers: rope_freqs\.weight and 1 more$"
    with pytest.warns(UserWarning, match=match) as said:
        klfast.load_model(path)
    assert said[0].filename == __file__
    gguf_files.write(path, "llama", gguf_files.tiny("llama"), metadata={"llama.rope.scaling.factor": 8.0})
    with pytest.warns(UserWarning, match=r"left out by transformers: llama\.rope\.scaling\.factor$"):
        klfast.load_model(path)
