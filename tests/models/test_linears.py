"""Linear layers of a model, their sizes, and fingerprints."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from klfast.core.errors import InvalidInputError, ModelMismatchError, UnknownLayerError
from klfast.models import fingerprint, head, linears, matrices, sizes
from klfast.models.fingerprint import Fingerprint
from klfast.nn import QuantLinear
from klfast.quant.spec import QuantSpec
from klfast.sensitivity.results import Sensitivities


def mamba(tied, dtype=torch.float32):
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, tie_word_embeddings=tied)
    return MambaForCausalLM(config).to(dtype)


def test_linears_exclude_convolutions_and_embeddings():
    names = list(linears.linears(mamba(tied=False)))
    per_block = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    assert names == [f"backbone.layers.{i}.mixer.{n}" for i in range(2) for n in per_block] + ["lm_head"]
    mamba2 = Mamba2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=4, n_groups=1
    )
    assert list(linears.linears(Mamba2ForCausalLM(mamba2))) == [
        "backbone.layers.0.mixer.in_proj",
        "backbone.layers.0.mixer.out_proj",
        "lm_head",
    ]


def test_unknown_layer_names_the_closest():
    with pytest.raises(UnknownLayerError, match=r"no linear layer 'lm_haed'; did you mean 'lm_head'\?"):
        matrices.matrix(mamba(tied=True), "lm_haed")


@pytest.mark.parametrize("tied", [True, False])
def test_head(tied):
    model = mamba(tied)
    assert head.head_name(model) == "lm_head"
    assert head.is_head_tied(model) == tied


def test_model_without_head():
    with pytest.raises(InvalidInputError, match="MambaModel has no output embeddings"):
        head.head_name(mamba(tied=True).backbone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_add_up_to_the_saved_file(tied, dtype, tmp_path):
    model = mamba(tied, dtype)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    found = Sensitivities.of(model)
    assert sum(info.float_bytes for info in found.layers.values()) + found.other_bytes == saved
    assert found.layers["lm_head"].float_bytes == 50 * 16 * dtype.itemsize
    assert found.layers["lm_head"].shape == (50, 16)


def test_rotary_tables_are_not_counted():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    norms_and_embedding = 4 * (3 * 16 + 50 * 16)
    assert sizes.other_bytes(model) == norms_and_embedding


def test_bytes_of_a_quantized_layer():
    spec = QuantSpec(4, 32, False)
    model = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 8, bias=False))
    before = sizes.other_bytes(model)
    model[0] = QuantLinear.from_linear(model[0], spec)
    assert sizes.weight_bytes(matrices.matrix(model, "0")) == spec.nbytes((40, 96)) + 16
    assert sizes.other_bytes(model) == before == 40 * 4


def test_fingerprint_matches_the_model_in_another_dtype_but_no_other_model():
    model = mamba(tied=True)
    known = fingerprint.fingerprint(model)
    fingerprint.require_match(known, model.to(torch.bfloat16), "the plan")
    with torch.no_grad():
        model.backbone.layers[1].mixer.x_proj.weight.mul_(1.05)
    with pytest.raises(ModelMismatchError, match="the plan was made for other weights"):
        fingerprint.require_match(known, model, "the plan")
    with pytest.raises(ModelMismatchError, match="the plan was made for a model with other layers"):
        fingerprint.require_match(known, mamba(tied=True).backbone, "the plan")


def test_fingerprints_match_to_one_percent():
    known = Fingerprint("a", (1.0, 2.0, 0.0))
    assert known.matches(Fingerprint("a", (1.009, 1.985, 0.0)))
    assert not known.matches(Fingerprint("a", (1.02, 2.0, 0.0)))
    assert not known.matches(Fingerprint("a", (1.0, 2.0, 0.1)))
    assert not known.matches(Fingerprint("a", (1.0, float("nan"), 0.0)))
    assert not known.matches(Fingerprint("b", known.norms))
    assert not known.matches(Fingerprint("a", (1.0, 2.0)))
    assert not Fingerprint("a", (1.0, 2.0)).matches(known)


def test_a_fingerprint_with_too_few_norms_does_not_match():
    model = mamba(tied=True)
    known = fingerprint.fingerprint(model)
    with pytest.raises(ModelMismatchError, match="the plan was made for other weights"):
        fingerprint.require_match(Fingerprint(known.structure, known.norms[:-1]), model, "the plan")
